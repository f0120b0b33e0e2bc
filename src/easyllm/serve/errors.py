"""Answers in OpenAI's error form."""

from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse


class APIError(HTTPException):
    """An answer in OpenAI's error form; an HTTPException, so that it passes through where FastAPI reads the body."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(status, message)
        self.param = param


def error_response(status: int, message: str, *, param: str | None = None) -> JSONResponse:
    """The answer to a request that went wrong."""
    return JSONResponse(error_body(status, message, param), status_code=status)


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """What such an answer holds, or an event of a stream that has begun."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
