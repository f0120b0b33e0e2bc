"""HTTP connections that do not wait for ever, on uvicorn's: bounds on reading, on writing and on ending the server.

asyncio gives a server no such bounds: a client that sends one byte a minute, or never reads its answer, would keep its
connection, and keep the server from ending.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from easyllm.serve.errors import error_response
from easyllm.serve.guard import SECURITY_HEADERS
from easyllm.serve.limits import ServeLimits

logger = logging.getLogger(__name__)
KEEP_ALIVE_S = (
    30  # longer than the 5 s of common clients, which would else meet a closing connection
)
GRACE_S = 1
LEAST_WRITTEN_BYTES = 1024
"""A client that takes less than this within the write timeout is held to take nothing."""


class BoundedProtocol(H11Protocol):
    """An HTTP/1.1 connection under `limits`; errors below the application have the form of all others."""

    limits = ServeLimits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begun = False
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` says the client is slow
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading()
        self._stop_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._begun:
            self._begun = True
            self._await_request()
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # all of the request is here
            self._begun = False
            self._stop_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_writing()

    def resume_writing(self) -> None:
        self._stop_writing()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        """Answers what is not HTTP."""
        self._refuse(400, "the request is not valid HTTP/1.1; check its headers")

    def shutdown(self) -> None:
        """The server is told to end: a request that has not arrived is not waited for."""
        if self._begun:
            self._refuse(503, "the server is ending; try again later")
        else:
            super().shutdown()

    def end(self) -> None:
        """Drops a client that does not read, and so keeps the server from ending; the engine ends a running answer."""
        if self.transport.is_closing() or self._writing is not None:
            self.transport.abort()

    def _await_request(self) -> None:
        self._stop_reading()
        self._reading = self.loop.call_later(self.limits.read_timeout_s, self._read_too_long)

    def _read_too_long(self) -> None:
        self._reading = None
        if self.transport.is_closing():
            return
        if not self._begun:
            self.transport.close()
            return
        seconds = self.limits.read_timeout_s
        self._refuse(408, f"the request did not arrive within {seconds:g} s; send it faster")

    def _await_writing(self) -> None:
        left = self.transport.get_write_buffer_size()
        wait = self.limits.write_timeout_s
        self._writing = self.loop.call_later(wait, self._written_too_slowly, left)

    def _written_too_slowly(self, left: int) -> None:
        if self.transport.get_write_buffer_size() <= left - LEAST_WRITTEN_BYTES:
            self._await_writing()
            return
        self._writing = None
        logger.info("a client does not read its answer; its connection is closed")
        self.transport.abort()

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _refuse(self, status: int, message: str) -> None:
        """Answers for the application, where no answer has begun, and closes the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what the application sends from now on goes nowhere
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = error_response(status, message, headers=SECURITY_HEADERS)
            headers = [*answer.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(
                    status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()
                ),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class BoundedServer(uvicorn.Server):
    """A server that ends within the drain timeout and a little more.

    Args:
        config: its `timeout_graceful_shutdown` is set here.
        end_requests: ends the requests that run, with an answer that says why.
    """

    def __init__(
        self, config: uvicorn.Config, *, limits: ServeLimits, end_requests: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._drain_s, self._end_requests = limits.drain_timeout_s, end_requests
        config.timeout_graceful_shutdown = math.ceil(limits.drain_timeout_s + GRACE_S)

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Waits for running requests, then ends them."""
        ending = asyncio.get_running_loop().call_later(self._drain_s, self._end_all)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    def _end_all(self) -> None:
        self._end_requests()
        for connection in list(self.server_state.connections):
            cast("BoundedProtocol", connection).end()
