"""Parses HTTP/1.1 responses incrementally (RFC 9112), for the client of the load test."""

from collections.abc import Callable

MAX_HEAD_BYTES = 64 * 2**10
MAX_CHUNK_LINE_BYTES = 1024
OnBody = Callable[[bytes, float], None]
"""Receives a part of a body and the reading of `time.perf_counter()` at which it arrived."""


class HTTPFailure(Exception):
    """A request got no complete response; the message is a short description of the kind."""


class ResponseParser:
    """Parses one response, whose bytes arrive in any pieces.

    Args:
        on_body: receives the parts of the body.

    Attributes:
        status: the status code; 0 until the head has arrived.
        headers: names in lower case.
        complete: whether the whole response has arrived.
        reusable: whether the connection may be used for another request.
    """

    def __init__(self, on_body: OnBody) -> None:
        self.status, self.headers = 0, dict[str, str]()
        self.complete, self.reusable = False, True
        self._on_body, self._buffer = on_body, b""
        self._left: int | None = None  # bytes of the body, or of the chunk; None: until the end
        self._parse: Callable[[float], bool] = self._parse_head

    def feed(self, data: bytes, now_s: float) -> None:
        """Takes the next bytes.

        Raises:
            HTTPFailure: they are not valid HTTP/1.1.
        """
        self._buffer += data
        while not self.complete and self._parse(now_s):
            pass

    def end(self) -> None:
        """Takes the end of the connection.

        Raises:
            HTTPFailure: the response is not complete.
        """
        if self._parse == self._parse_until_end:
            self.complete = True
        elif not self.complete:
            raise HTTPFailure("connection closed early")
        self.reusable = False

    def _parse_head(self, _now_s: float) -> bool:
        """Parses the status line and headers; returns whether they have arrived."""
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise HTTPFailure("invalid HTTP: the head is too long")
            return False
        self._buffer = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise HTTPFailure("invalid HTTP: not a status line")
        status = int(words[1])
        if 100 <= status < 200:  # an interim response
            return True
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self.status = status
        closing = self.headers.get("connection", "").lower() == "close"
        self.reusable = words[0] == "HTTP/1.1" and not closing
        self._choose_body()
        return True

    def _choose_body(self) -> None:
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            self.complete = True
        elif self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._parse = self._parse_chunk_size
        elif length is None:
            self._parse = self._parse_until_end
        elif not (length.isascii() and length.isdigit() and len(length) < 20):
            raise HTTPFailure("invalid HTTP: Content-Length is not a number")
        else:
            self._left = int(length)
            self.complete = self._left == 0
            self._parse = self._parse_sized

    def _parse_sized(self, now_s: float) -> bool:
        assert self._left is not None, "set with the parser's state"
        part, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
        self._left -= len(part)
        if part:
            self._on_body(part, now_s)
        self.complete = self._left == 0
        return False

    def _parse_until_end(self, now_s: float) -> bool:
        part, self._buffer = self._buffer, b""
        if part:
            self._on_body(part, now_s)
        return False

    def _parse_chunk_size(self, _now_s: float) -> bool:
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            if len(self._buffer) > MAX_CHUNK_LINE_BYTES:
                raise HTTPFailure("invalid HTTP: the size of a chunk is too long")
            return False
        self._buffer = rest
        digits = line.partition(b";")[0].strip()
        try:
            self._left = int(digits, 16)
        except ValueError:
            raise HTTPFailure("invalid HTTP: the size of a chunk is not a number") from None
        self._parse = self._parse_chunk if self._left else self._parse_trailer
        return True

    def _parse_chunk(self, now_s: float) -> bool:
        assert self._left is not None, "set with the parser's state"
        part, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
        self._left -= len(part)
        if part:
            self._on_body(part, now_s)
        if self._left or len(self._buffer) < 2:
            return False
        self._buffer = self._buffer[2:]  # the line break after the chunk
        self._parse = self._parse_chunk_size
        return True

    def _parse_trailer(self, _now_s: float) -> bool:
        line, end, rest = self._buffer.partition(b"\r\n")
        if end:
            self._buffer = rest
            self.complete = not line
        return bool(end)
