"""The requests the server takes, checked at the edge: a field that is not honoured is an error."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from easyllm.engine.request import MAX_STOPS, Count, SamplingParams, StopString

MAX_NEW_TOKENS = 32_768
MAX_MESSAGES = 2_000
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20  # OpenAI's


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message; content is text, or OpenAI's list of text parts.

    `name` is given to the chat template with the rest of the message, as `transformers` gives it. Clients send it as a
    matter of course; whether the model sees it is the template's choice.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As chat templates take it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": text}
        return message if self.name is None else message | {"name": self.name}


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Strict):
    """`POST /v1/chat/completions`; `top_k` is an addition to OpenAI's fields."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    stop: list[StopString] | None = Field(default=None, max_length=MAX_STOPS)
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0
    logit_bias: dict[Count, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default={}, max_length=1024
    )
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        """A text is a list of one: as a union its errors would be those of the wrong kind."""
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    def sampling(self) -> SamplingParams:
        """As the engine takes it."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            stop=tuple(self.stop or ()),
            n=self.n,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
