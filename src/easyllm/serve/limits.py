"""Timeouts for slow clients, and bounds on what waits."""

from typing import Annotated

from pydantic import Field

from easyllm.core.config import Config

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServeLimits(Config):
    """Timeouts, in seconds, that keep a slow client from blocking the server, and bounds.

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
    max_waiting: Annotated[int, Field(ge=1, le=100_000)] = Field(
        1024,
        description="Maximum number of requests that wait for a model; further ones get status "
        "429.",
    )
    unload_idle_s: Seconds | None = Field(
        None,
        description="Seconds without a request after which a model is unloaded; the next request "
        "loads it again. By default models stay loaded.",
    )
