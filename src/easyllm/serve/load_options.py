"""Options of a load test."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from easyllm.core.config import Config

Rate = Annotated[float, Field(gt=0, le=1e6)]
Clients = Annotated[int, Field(ge=1, le=100_000)]
DEFAULT_CLIENTS = 32


class LoadOptions(Config):
    """How a server is loaded: arrivals, sizes, and what is sent."""

    model: str | None = Field(
        None, description="Name of the model; by default the only one that the server lists."
    )
    rate: tuple[Rate, ...] = Field(
        (),
        description="Requests per second, arriving at random (Poisson), whether or not earlier "
        "ones are answered.",
    )
    concurrency: tuple[Clients, ...] = Field(
        (),
        description="Number of clients, each of which sends its next request when the last one "
        f"is answered. By default, and without a rate, {DEFAULT_CLIENTS}.",
    )
    requests: int = Field(200, ge=1, description="Requests that are measured, for each load.")
    warmup: int | None = Field(
        None,
        ge=0,
        description="Requests before those, which are not measured; by default the number of "
        "clients, or 4 with a rate.",
    )
    prompt_tokens: int = Field(
        128, ge=1, description="Tokens of a prompt, as the server counts them."
    )
    max_tokens: int = Field(64, ge=1, description="Maximum tokens of a completion.")
    ignore_eos: bool = Field(
        False,
        description="Generate the maximum of tokens always (a field that vLLM, llama.cpp and this "
        "server have).",
    )
    dialect: Literal["chat", "completions"] = Field(
        "chat", description="The route: /v1/chat/completions or /v1/completions."
    )
    seed: int = Field(0, ge=0, description="Seed of arrivals and of random prompts.")
    timeout_s: float = Field(
        600.0, gt=0, le=86_400, description="Maximum seconds of a request; a longer one failed."
    )

    @model_validator(mode="after")
    def _one_kind_of_load(self) -> Self:
        if self.rate and self.concurrency:
            raise ValueError("rate and concurrency are two kinds of load; give one of them")
        return self

    @property
    def loads(self) -> tuple["Load", ...]:
        """The loads to measure, one after the other."""
        if self.rate:
            return tuple(Load(rate=rate) for rate in self.rate)
        clients = self.concurrency or (DEFAULT_CLIENTS,)
        return tuple(Load(clients=number) for number in clients)

    def warmup_of(self, load: "Load") -> int:
        """Returns the number of requests before the measured ones of a load."""
        return (load.clients or 4) if self.warmup is None else self.warmup


class Load(Config):
    """One kind of load: arrivals at a rate (open loop), or clients that wait (closed loop)."""

    rate: float | None = Field(None, description="Requests per second.")
    clients: int | None = Field(None, description="Number of clients.")

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return f"{self.clients} client{'s' if self.clients != 1 else ''}"
