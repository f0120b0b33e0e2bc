"""Error responses, in the format of the dialect to which the path of the request belongs.

OpenAI's is `{"error": {"message", "type", "param", "code"}}`; Anthropic's, for `/v1/messages`,
`{"type": "error", "error": {"type", "message"}}`.
"""

import logging
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as RoutingError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from easyllm.core.json_types import JsonObject
from easyllm.serve.json_text import JSONResponse

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


class AnthropicErrorDetail(BaseModel):
    """Details of an error in Anthropic's format."""

    type: str = Field(description="Class of the error, such as invalid_request_error.")
    message: str = Field(description="What is wrong, and what to do.")


class AnthropicErrorBody(BaseModel):
    """The body of an error response in Anthropic's format."""

    type: Literal["error"] = Field("error", description="Type of the object.")
    error: AnthropicErrorDetail = Field(description="The error.")


ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's error types by status; other statuses below 500 are `invalid_request_error`."""


class APIError(RoutingError):
    """An error with an HTTP status, reported in the format of the dialect.

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
    path: str = "",
) -> JSONResponse:
    """Returns an error as an HTTP response, in the dialect of `path`."""
    body = error_body(status, message, param=param, code=code, path=path)
    return JSONResponse(body, status_code=status, headers=headers)


def error_body(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    path: str = "",
) -> JsonObject:
    """Returns the body of an error response, or of an error event in a stream already begun."""
    message = _printable(message)
    if is_anthropic(path):
        other = "invalid_request_error" if status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(status, other)
        return AnthropicErrorBody(
            error=AnthropicErrorDetail(type=kind, message=message)
        ).model_dump()
    detail = ErrorDetail(
        message=message,
        type=_OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
        param=None if param is None else _printable(param),
        code=code,
    )
    return ErrorBody(error=detail).model_dump()


_OPENAI_TYPES = {429: "rate_limit_error"}


def is_anthropic(path: str) -> bool:
    """Returns whether a path belongs to Anthropic's API."""
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


async def on_api_error(request: Request, error: Exception) -> Response:
    """Handles an `APIError`."""
    assert isinstance(error, APIError)
    return error_response(
        error.status_code,
        error.message,
        param=error.param,
        code=error.code,
        headers={"Retry-After": "1"} if error.status_code == 429 else None,
        path=request.url.path,
    )


async def on_routing_error(request: Request, error: Exception) -> Response:
    """Handles an unknown path (404), or a method its route lacks (405, with `Allow`)."""
    assert isinstance(error, RoutingError)
    asked = f"{request.scope.get('asked_method', request.method)} {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
        message = f"{asked} is not supported; use {headers['Allow']}"
    elif error.status_code == 404:
        message = f"there is no route {asked}; GET /openapi.json lists the routes"
    else:
        message = str(error.detail)
    return error_response(error.status_code, message, headers=headers, path=request.url.path)


def _methods(request: Request) -> set[str]:
    """Returns the methods of all routes with the path of a request."""
    found = set[str]()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return found


async def on_exception(request: Request, _error: Exception) -> Response:
    """Handles an unexpected exception; the traceback is in the log."""
    message = "the server failed on this request; see the server's log"
    return error_response(500, message, path=request.url.path)


def _printable(text: str) -> str:
    """Truncates `text` and escapes lone surrogates, which a field name in a request may contain."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…"
