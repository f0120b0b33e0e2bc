"""Middleware for every request: host, API key, body size and security headers."""

import asyncio
import hmac
import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from easyllm.core.errors import ConfigError
from easyllm.serve.errors import APIError, error_response

MAX_BODY_BYTES = 8 * 2**20
PUBLIC = ("/health", "/")  # the page contains no secret and prompts for the key itself
PUBLIC_PREFIX = "/assets/"  # the page's own files
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Added to every response; the page overrides the Content-Security-Policy."""
_TOO_LARGE = f"the request is larger than {MAX_BODY_BYTES} bytes; send less"
_NO_KEY = "the API key is missing or wrong; send Authorization: Bearer KEY, or X-Api-Key: KEY"


class Guard:
    """Checks the API key and the declared size before reading, and counts the body while reading.

    HEAD is handled as GET without a body (RFC 9110, 9.3.2).

    Without an API key, the `Host` header must name an IP address, `localhost` or one of
    `allowed_hosts`. Otherwise a page of another site could have its own host name resolve to this
    machine (DNS rebinding) and read answers as if they came from its own origin. With a key, such
    a page lacks the key.

    Args:
        app: the wrapped ASGI application.
        api_key: if set, required by every route that is not in `PUBLIC`.
        allowed_hosts: further host names, without port; `*` allows all.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None = None, allowed_hosts: Collection[str] = ()
    ) -> None:
        self.app, self._key = app, None if api_key is None else api_key.encode()
        self._hosts = {host.lower().rstrip(".") for host in (*allowed_hosts, "localhost")}

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
        except asyncio.CancelledError:  # the server is shutting down and no longer waits
            if answer.begun:
                raise
            ending = error_response(
                503, "the server is shutting down; try again later", path=scope["path"]
            )
            await ending(scope, receive, answer)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        """Returns the error response to a rejected request; None if the request may proceed."""
        if self._key is None and not self._knows_host(headers):
            given = headers.get("host", "")
            return error_response(
                403,
                f"the host {given[:100]!r} is not served; use the address of this machine, or "
                "start the server with --allowed-host NAME",
                code="host_not_allowed",
                path=path,
            )
        public = path in PUBLIC or path.startswith(PUBLIC_PREFIX)
        if self._key is not None and not public and not self._knows_key(headers):
            return error_response(
                401,
                _NO_KEY,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
                path=path,
            )
        if "content-length" in headers and "transfer-encoding" in headers:
            return error_response(
                400,
                "the request has both Content-Length and Transfer-Encoding; send one of them",
                headers={"Connection": "close"},  # RFC 9112, 6.1: the message length is ambiguous
                path=path,
            )
        size = headers.get("content-length", "0")
        digits = size.isascii() and size.isdigit() and len(size) <= 20
        if not digits or int(size) > MAX_BODY_BYTES:
            return error_response(413, _TOO_LARGE, path=path)
        return None

    def _knows_host(self, headers: Headers) -> bool:
        """Returns whether the request names a host that it may name; HTTP/1.0 need not name any."""
        if "*" in self._hosts or "host" not in headers:
            return True
        given = headers["host"].strip().lower()
        name = given if given.endswith("]") else given.rpartition(":")[0] or given
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.rstrip(".") in self._hosts
        return True

    def _knows_key(self, headers: Headers) -> bool:
        """Returns whether any of the key headers contains the key, compared in constant time."""
        assert self._key is not None, "only called when a key is required"
        given = [value.encode("latin-1") for value in headers.getlist("x-api-key")]
        for value in headers.getlist("authorization"):
            scheme, _, credentials = value.partition(" ")
            if scheme.lower() == "bearer":  # RFC 9110, 11.1: case-insensitive
                given.append(credentials.strip(" ").encode("latin-1"))
        matches = [hmac.compare_digest(each, self._key) for each in given]
        return any(matches)


class _Answer:
    """A `send` that adds the security headers and records whether the response has begun.

    It drops the body of responses to HEAD.
    """

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
    """Rejects a key that no client can send.

    Raises:
        ConfigError: the key is empty, or contains a space or a non-ASCII character.
    """
    if api_key is None or (api_key and all("!" <= character <= "~" for character in api_key)):
        return
    raise ConfigError(
        "the API key is empty, or contains a space or a non-ASCII character; "
        "set another one, or leave it out to serve without a key"
    )


def _counted(receive: Receive) -> Receive:
    """Wraps `receive` so that it fails once the body is too large, whatever the headers declare."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise APIError(413, _TOO_LARGE)
        return message

    return counted
