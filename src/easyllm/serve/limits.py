"""Timeouts for slow clients."""

from typing import Annotated

from pydantic import Field

from easyllm.core.config import Config

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServeLimits(Config):
    """Timeouts, in seconds, that keep a slow client from blocking the server.

    Attributes:
        read_timeout_s: maximum time from a request's first byte until its headers and body are
            complete, and from connecting to the first byte.
        write_timeout_s: maximum time without the client reading any of the data sent to it.
        drain_timeout_s: maximum time that running requests may take to finish once shutdown
            begins; requests that have not fully arrived by then are rejected immediately. The
            default matches the grace period of `docker stop`.
    """

    read_timeout_s: Seconds = 60.0
    write_timeout_s: Seconds = 60.0
    drain_timeout_s: Seconds = 10.0
