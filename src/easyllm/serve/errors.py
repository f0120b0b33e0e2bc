"""Answers in OpenAI's error form, whatever went wrong: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as RoutingError
from starlette.responses import Response

logger = logging.getLogger(__name__)
MAX_SHOWN_CHARS = 1000


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field of the request, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class APIError(HTTPException):
    """An answer in OpenAI's error form; an HTTPException, so that Starlette passes it through to the handler."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(status, message)
        self.message, self.param, self.code = message, param, code


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The answer to a request that went wrong."""
    body = error_body(status, message, param=param, code=code)
    return JSONResponse(body, status_code=status, headers=headers)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """What such an answer holds, or an event of a stream that has begun."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    detail = ErrorDetail(
        message=_printable(message),
        type=kind,
        param=None if param is None else _printable(param),
        code=code,
    )
    return ErrorBody(error=detail).model_dump()


async def on_api_error(_: Request, error: Exception) -> Response:
    """The answer to an `APIError`."""
    assert isinstance(error, APIError)
    return error_response(error.status_code, error.message, param=error.param, code=error.code)


async def on_routing_error(request: Request, error: Exception) -> Response:
    """The answer where no route takes the path, or none takes the method (its `Allow` says which are taken)."""
    assert isinstance(error, RoutingError)
    asked = f"{request.scope.get('asked_method', request.method)} {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 405:
        allowed = [word.strip() for word in headers.pop("Allow", "").split(",")]
        headers["Allow"] = ", ".join([*allowed, *(["HEAD"] if "GET" in allowed else [])])
        message = f"{asked} is not supported; use {headers['Allow']}"
    elif error.status_code == 404:
        message = f"there is no {asked}; GET /openapi.json lists what there is"
    else:
        message = str(error.detail)
    return error_response(error.status_code, message, headers=headers)


async def on_exception(_: Request, _error: Exception) -> Response:
    """The answer to a mistake of the server's own; the log has the traceback."""
    return error_response(500, "the server failed on this request; see the server's log")


def _printable(text: str) -> str:
    """`text` as UTF-8 can hold it (a request may name a field by half a surrogate pair), shortened."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…"
