"""A small HTTP/1.1 client on asyncio, for measurements.

A general client spends more time on a chunk of a stream than the server does on a token. This one
parses responses in the callback that receives their bytes: no task is woken per chunk, and the time
of arrival is taken there. Connections are kept open and reused.
"""

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from easyllm.core.errors import ConfigError
from easyllm.serve.http_response import HTTPFailure, OnBody, ResponseParser

MAX_BODY_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens.

    Attributes:
        host: name or IP address.
        port: TCP port.
        secure: whether TLS is used.
        prefix: start of all paths, without a slash at its end.
    """

    host: str
    port: int
    secure: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Returns the address in a URL, whose scheme may be missing (`localhost:8420`).

        Raises:
            ConfigError: it is not the URL of an HTTP server.
        """
        full = url if "://" in url else f"http://{url}"
        advice = "write it like http://127.0.0.1:8420"
        try:
            parts = urlsplit(full)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is not a URL ({error}); {advice}") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"{url!r} is not the URL of an HTTP server; {advice}")
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ConfigError(f"{url!r} contains a character that URLs do not have; {advice}")
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} has a user, query or fragment; leave it out")
        secure = parts.scheme == "https"
        return cls(host, port or (443 if secure else 80), secure, parts.path.rstrip("/"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}{self.prefix}"


class _Connection(asyncio.Protocol):
    """One connection, on which requests follow each other."""

    def __init__(self) -> None:
        self.open, self.parser = False, ResponseParser(lambda _part, _now_s: None)
        self._done: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "a stream"
        self._transport, self.open = transport, True

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if self._done is None or self._done.done():
            self.close()  # bytes that no request asked for
            return
        try:
            self.parser.feed(data, now_s)
        except HTTPFailure as failure:
            self._done.set_exception(failure)
        else:
            if self.parser.complete:
                self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._done is None or self._done.done():
            return
        try:
            self.parser.end()
        except HTTPFailure as failure:
            self._done.set_exception(HTTPFailure("connection reset") if error else failure)
        else:
            self._done.set_result(None)

    async def send(self, message: bytes, on_body: OnBody) -> ResponseParser:
        """Sends a request and waits for its response."""
        assert self._transport is not None, "connected"
        self.parser = parser = ResponseParser(on_body)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            await self._done
        finally:
            if not parser.complete or not parser.reusable:
                self.close()
        return parser

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()


class HTTPClient:
    """Sends requests to one server.

    Args:
        address: the server.
        headers: sent with every request.
        timeout_s: maximum time of a request, including the connection.

    Attributes:
        num_repeated: number of requests that were sent again, because the server closed an idle
            connection without answering.
    """

    def __init__(
        self, address: Address, *, headers: Mapping[str, str] | None = None, timeout_s: float = 600
    ) -> None:
        self.address, self._timeout_s = address, timeout_s
        fields = {"Host": _host(address), "User-Agent": "easyllm-bench", **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._tls = ssl.create_default_context() if address.secure else None
        self._idle: list[_Connection] = []
        self.num_repeated = 0

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Returns the status and body of a response.

        Raises:
            HTTPFailure: there is no complete response.
        """
        parts, size = list[bytes](), 0

        def keep(part: bytes, _now_s: float) -> None:
            nonlocal size
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise HTTPFailure("the response is too large")
            parts.append(part)

        parser = await self.stream(method, path, body, keep)
        return parser.status, b"".join(parts)

    async def stream(self, method: str, path: str, body: bytes, on_body: OnBody) -> ResponseParser:
        """Sends a request; `on_body` receives the body as it arrives.

        Returns:
            The parsed head of the response, once the body is complete.

        Raises:
            HTTPFailure: there is no complete response.
        """
        head = f"{method} {self.address.prefix}{path} HTTP/1.1\r\n{self._head}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        message = f"{head}\r\n".encode("latin-1") + body
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._send(message, on_body)
        except TimeoutError:
            raise HTTPFailure(f"no complete response within {self._timeout_s:g} s") from None

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _send(self, message: bytes, on_body: OnBody) -> ResponseParser:
        self._idle = [connection for connection in self._idle if connection.open]
        if self._idle:
            connection = self._idle.pop()
            try:
                return await self._use(connection, message, on_body)
            except HTTPFailure:
                # a server may close an idle connection just when a request is sent on it
                if connection.parser.status:
                    raise
                self.num_repeated += 1
        return await self._use(await self._connect(), message, on_body)

    async def _use(
        self, connection: _Connection, message: bytes, on_body: OnBody
    ) -> ResponseParser:
        parser = await connection.send(message, on_body)
        if connection.open:
            self._idle.append(connection)
        return parser

    async def _connect(self) -> _Connection:
        loop, address = asyncio.get_running_loop(), self.address
        try:
            _, connection = await loop.create_connection(
                _Connection, address.host, address.port, ssl=self._tls
            )
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", None) or error.reason or str(error)
            raise HTTPFailure(f"TLS: {reason.lower().replace('_', ' ')}") from None
        except (OSError, UnicodeError) as error:
            raise HTTPFailure(f"cannot connect: {_reason(error)}") from None
        return connection


def _reason(error: OSError | UnicodeError) -> str:
    """Returns why a connection failed; asyncio replaces the system's words by its own."""
    number = getattr(error, "errno", None) or 0
    if number > 0:
        return os.strerror(number)
    if isinstance(error, socket.gaierror):
        return "the host name is not known"
    if isinstance(error, OSError) and str(error).startswith("Multiple exceptions"):
        return "no address of the host accepts the connection"
    return str(error)


def _host(address: Address) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    usual = address.port == (443 if address.secure else 80)
    return host if usual else f"{host}:{address.port}"
