"""What is recorded about one HTTP request, for the metrics and the request log."""

import time
from dataclasses import dataclass, field

TRACE = "easyllm.trace"
"""The key of a request's trace in its ASGI scope."""


@dataclass(slots=True)
class RequestTrace:
    """The course of an HTTP request: when it arrived, what it used, how it ended.

    It contains no text of prompts or completions, no headers and no keys. Times are readings of
    `time.monotonic()` unless their name says otherwise. The middleware `Observe` creates it, the
    route names the model, and the engine's service counts tokens.

    Attributes:
        method: HTTP method.
        path: path of the URL as sent, without its query.
        route: the route's own path, such as `/v1/models/{model_id:path}`; `other` if there is none.
        model: name of the model that the client asked for; empty if it is not known.
        status: HTTP status of the response; 0 until it begins.
        prompt_tokens: tokens of all prompts.
        cached_tokens: how many of those were in the prefix cache.
        completion_tokens: tokens generated for all completions.
        finish_reasons: why the completions ended, in that order.
        client_gone: whether the client disconnected before the response was complete.
        arrived_s: when the request's head had arrived.
        arrived_unix_s: the same, in seconds since 1970.
        first_token_s: when the engine delivered the first token.
        ended_s: when the response was complete, or the client gone.
    """

    method: str = ""
    path: str = ""
    route: str = "other"
    model: str = ""
    status: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    client_gone: bool = False
    arrived_s: float = field(default_factory=time.monotonic)
    arrived_unix_s: float = field(default_factory=time.time)
    first_token_s: float | None = None
    ended_s: float | None = None

    @property
    def first_token_after_s(self) -> float | None:
        """Seconds from arrival to the first token; None without a token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def total_s(self) -> float:
        """Seconds from arrival to the end, or until now."""
        end = time.monotonic() if self.ended_s is None else self.ended_s
        return end - self.arrived_s
