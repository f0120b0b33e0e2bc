"""Timeouts for HTTP connections: limits on reading, writing and shutdown, on top of uvicorn.

asyncio servers have no such limits. A client that sends one byte a minute or never reads its
response would keep its connection open forever and prevent the server from shutting down.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from easyllm.core.json_types import Json
from easyllm.serve.errors import error_response
from easyllm.serve.guard import SECURITY_HEADERS
from easyllm.serve.limits import ServeLimits
from easyllm.serve.trace import TRACE, RequestTrace

logger = logging.getLogger(__name__)
KEEP_ALIVE_S = (
    30  # longer than the 5 s of common clients, which would otherwise race a closing connection
)
GRACE_S = 1
MIN_WRITTEN_BYTES = 1024
"""A client that reads fewer bytes than this within the write timeout counts as stalled."""


class BoundedProtocol(H11Protocol):
    """An HTTP/1.1 connection with timeouts.

    Errors raised before the application sees the request use OpenAI's format as well.
    """

    limits = ServeLimits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the read timeout of the first request."""
        super().connection_made(transport)
        self._begun = False
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` detects a slow client
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the timeouts."""
        self._stop_reading()
        self._stop_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Restarts the read timeout at a request's first byte and stops it at its last."""
        if not self._begun:
            self._begun = True
            self._await_request()
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # the request is complete
            self._begun = False
            self._stop_reading()

    def pause_writing(self) -> None:
        """Starts the write timeout."""
        super().pause_writing()
        self._await_writing()

    def resume_writing(self) -> None:
        """Stops the write timeout."""
        self._stop_writing()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        """Responds to input that is not valid HTTP."""
        self._refuse(400, "the request is not valid HTTP/1.1; check its headers")

    def shutdown(self) -> None:
        """Closes the connection on shutdown; an incomplete request is rejected, not awaited."""
        if self._begun:
            self._refuse(503, "the server is shutting down; try again later")
        else:
            super().shutdown()

    def end(self) -> None:
        """Aborts the connection if its client does not read, so that it cannot delay shutdown.

        A response that is still being generated is ended by the engine instead.
        """
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
        if self.transport.get_write_buffer_size() <= left - MIN_WRITTEN_BYTES:
            self._await_writing()
            return
        self._writing = None
        logger.info("a client does not read its response; its connection is closed")
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
        """Sends an error unless a response has begun, and closes the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # discards whatever the application still sends
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
            self._record(status)
        self.transport.close()

    def _record(self, status: int) -> None:
        """Records the status of a response that the application does not send itself."""
        trace = cast("dict[str, object]", self.scope or {}).get(TRACE)
        if isinstance(trace, RequestTrace) and not trace.status:
            trace.status = status


class BoundedServer(uvicorn.Server):
    """A uvicorn server that shuts down within the drain timeout plus `GRACE_S`.

    Args:
        config: uvicorn's configuration; its `timeout_graceful_shutdown` is overwritten.
        limits: the timeouts.
        end_requests: ends all running requests with an error that states the reason.
    """

    def __init__(
        self, config: uvicorn.Config, *, limits: ServeLimits, end_requests: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._drain_s, self._end_requests = limits.drain_timeout_s, end_requests
        config.timeout_graceful_shutdown = math.ceil(limits.drain_timeout_s + GRACE_S)

    async def shutdown(self, sockets: list[Json] | None = None) -> None:
        """Waits for running requests up to the drain timeout, then ends them."""
        ending = asyncio.get_running_loop().call_later(self._drain_s, self._end_all)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    def _end_all(self) -> None:
        self._end_requests()
        for connection in list(self.server_state.connections):
            cast("BoundedProtocol", connection).end()
