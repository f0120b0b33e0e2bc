"""What every request passes before the routes: the key and the size of the body; and what every answer carries."""

import asyncio
import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from easyllm.core.errors import ConfigError
from easyllm.serve.errors import APIError, error_response

MAX_BODY_BYTES = 8 * 2**20
PUBLIC = ("/health", "/")  # the page holds no secret and asks for the key
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""On every answer; the page has a Content-Security-Policy of its own."""
_TOO_LARGE = f"the request is larger than {MAX_BODY_BYTES} bytes; send less"
_NO_KEY = "the API key is missing or wrong; send Authorization: Bearer KEY, or X-Api-Key: KEY"


class Guard:
    """Checks the key and the announced size before anything is read, and counts the body while it is.

    HEAD is answered as GET is, without the body (RFC 9110, 9.3.2).

    Args:
        app: what is guarded.
        api_key: asked of every route but the public ones when set.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None = None) -> None:
        self.app, self._key = app, None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, without_body=scope["method"] == "HEAD")
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, answer)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET", "asked_method": "HEAD"}
        try:
            await self.app(scope, _counted(receive), answer)
        except asyncio.CancelledError:  # the server ends, and did not wait any longer
            if answer.begun:
                raise
            ending = error_response(503, "the server is ending; try again later")
            await ending(scope, receive, answer)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        """The answer to a request that goes no further."""
        if self._key is not None and path not in PUBLIC and not self._knows_key(headers):
            return error_response(
                401, _NO_KEY, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        if "content-length" in headers and "transfer-encoding" in headers:
            return error_response(
                400,
                "the request has both Content-Length and Transfer-Encoding; send one of them",
                headers={"Connection": "close"},  # RFC 9112, 6.1: where it ends is in doubt
            )
        size = headers.get("content-length", "0")
        digits = size.isascii() and size.isdigit() and len(size) <= 20
        if not digits or int(size) > MAX_BODY_BYTES:
            return error_response(413, _TOO_LARGE)
        return None

    def _knows_key(self, headers: Headers) -> bool:
        """Whether one of the headers a key is sent in holds it; each is compared in constant time."""
        assert self._key is not None, "without a key nothing is asked"
        given = [value.encode("latin-1") for value in headers.getlist("x-api-key")]
        for value in headers.getlist("authorization"):
            scheme, _, credentials = value.partition(" ")
            if scheme.lower() == "bearer":  # RFC 9110, 11.1: in any case
                given.append(credentials.strip(" ").encode("latin-1"))
        matches = [hmac.compare_digest(each, self._key) for each in given]
        return any(matches)


class _Answer:
    """`send` that adds the security headers, drops the body of an answer to HEAD, and knows whether it has begun."""

    def __init__(self, send: Send, *, without_body: bool) -> None:
        self._send, self._without_body, self.begun = send, without_body, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        elif self._without_body and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)


def check_key(api_key: str | None) -> None:
    """Refuses a key that no client can send.

    Raises:
        ConfigError: it is empty, or holds a space or a character beyond ASCII.
    """
    if api_key is None or (api_key and all("!" <= character <= "~" for character in api_key)):
        return
    raise ConfigError(
        "the API key is empty, or holds a space or a character beyond ASCII; "
        "set another one, or leave it out to serve without a key"
    )


def _counted(receive: Receive) -> Receive:
    """`receive` that fails once the body is too large, whatever its headers said."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise APIError(413, _TOO_LARGE)
        return message

    return counted
