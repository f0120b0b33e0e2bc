"""Timeouts for slow clients."""

from typing import Annotated

from pydantic import Field

from easyllm.core.config import Config

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServeLimits(Config):
    """Timeouts, in seconds, that keep a slow client from blocking the server.

    The default of `drain_timeout_s` matches the grace period of `docker stop`.
    """

    read_timeout_s: Seconds = Field(
        60.0,
        description="Maximum seconds from a request's first byte until it has arrived "
        "completely, and from connecting to the first byte.",
    )
    write_timeout_s: Seconds = Field(
        60.0, description="Maximum seconds without the client reading any of the data sent to it."
    )
    drain_timeout_s: Seconds = Field(
        10.0,
        description="Maximum seconds that running requests may take to finish once shutdown "
        "begins; requests that have not arrived completely by then are rejected.",
    )
