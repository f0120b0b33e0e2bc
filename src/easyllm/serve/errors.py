"""Error responses in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from collections.abc import Mapping

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as RoutingError
from starlette.responses import Response

from easyllm.core.json_types import JsonObject

logger = logging.getLogger(__name__)
MAX_SHOWN_CHARS = 1000


class ErrorDetail(BaseModel):
    """Details of an error; `param` names the request field, `code` is machine-readable."""

    message: str = Field(description="What is wrong, and what to do.")
    type: str = Field(description="Class of the error, such as invalid_request_error.")
    param: str | None = Field(
        description="The request field with the error; null if it is not about a field."
    )
    code: str | None = Field(description="Machine-readable code; null if there is none.")


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail = Field(description="The error.")


class APIError(HTTPException):
    """An error with an HTTP status, reported in OpenAI's format.

    It derives from HTTPException so that Starlette passes it to the registered handler.
    """

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
    """Returns an error as an HTTP response."""
    body = error_body(status, message, param=param, code=code)
    return JSONResponse(body, status_code=status, headers=headers)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> JsonObject:
    """Returns the body of an error response, or of an error event in a stream already begun."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    detail = ErrorDetail(
        message=_printable(message),
        type=kind,
        param=None if param is None else _printable(param),
        code=code,
    )
    return ErrorBody(error=detail).model_dump()


async def on_api_error(_: Request, error: Exception) -> Response:
    """Handles an `APIError`."""
    assert isinstance(error, APIError)
    return error_response(error.status_code, error.message, param=error.param, code=error.code)


async def on_routing_error(request: Request, error: Exception) -> Response:
    """Handles an unknown path (404), or a method its route lacks (405, with `Allow`)."""
    assert isinstance(error, RoutingError)
    asked = f"{request.scope.get('asked_method', request.method)} {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 405:
        allowed = [word.strip() for word in headers.pop("Allow", "").split(",")]
        headers["Allow"] = ", ".join([*allowed, *(["HEAD"] if "GET" in allowed else [])])
        message = f"{asked} is not supported; use {headers['Allow']}"
    elif error.status_code == 404:
        message = f"there is no route {asked}; GET /openapi.json lists the routes"
    else:
        message = str(error.detail)
    return error_response(error.status_code, message, headers=headers)


async def on_exception(_: Request, _error: Exception) -> Response:
    """Handles an unexpected exception; the traceback is in the log."""
    return error_response(500, "the server failed on this request; see the server's log")


def _printable(text: str) -> str:
    """Truncates `text` and escapes lone surrogates, which a field name in a request may contain."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…"
