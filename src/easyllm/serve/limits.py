"""How long the server waits for a client."""

from typing import Annotated

from pydantic import Field

from easyllm.core.config import Config

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServeLimits(Config):
    """Bounds on what a client may keep the server waiting for, in seconds.

    Attributes:
        read_timeout_s: a request, headers and body, must have arrived so long after its first byte (and its first byte
            so long after the connection).
        write_timeout_s: a client must take some of what is sent to it within this time.
        drain_timeout_s: requests that run when the server is told to end may take so long to finish; those that have not
            arrived by then are refused at once. By default what `docker stop` waits.
    """

    read_timeout_s: Seconds = 60.0
    write_timeout_s: Seconds = 60.0
    drain_timeout_s: Seconds = 10.0
