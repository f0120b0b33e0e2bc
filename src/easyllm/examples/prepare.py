"""Prepares conversations as samples: chat template, loss mask, length limit, and counts of rows.

By default a conversation of several turns is one sample: every response is trained once and its
history is computed once. With `split_turns` each response is a separate sample that follows its
untrained history. The trained responses are the same, and so are their weights, because the loss
of a step is a mean over its tokens. (Training the responses in the history as well would count
early ones again with every later turn.) Splitting is meant for templates that render a turn
differently once others follow it, such as those that drop earlier reasoning. It costs computing
the history again for each turn.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from easyllm.core.errors import ConfigError, DataError
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import track
from easyllm.examples.conversations import Conversation
from easyllm.examples.sample import Sample
from easyllm.tokenizer.messages import TRAIN_KEYS, Message, trained_turns
from easyllm.tokenizer.tokenizer import Tokenizer

TooLong = Literal["cut", "drop"]
TrainOn = Literal["assistant", "all"]
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which chat templates look for its reasoning; each template uses one."""


@dataclass(slots=True)
class PreparationStats:
    """Counts of what became of the rows, reported before the first step.

    Attributes:
        rows: rows read.
        turns: responses that the rows were split into; 0 without splitting.
        samples: samples retained.
        tokens: input tokens of the samples.
        trained_tokens: input tokens with a loss.
        cut: samples truncated to the length limit.
        dropped_overlong: samples dropped because they are too long.
        dropped_untrained: samples dropped because none of their tokens has a loss.
        dropped_equal: preference pairs dropped because their responses are identical.
        unwritten_tools: rows with a tool or tool call whose name the chat template does not write.
        unwritten_reasoning: rows whose last response has reasoning that the chat template does not
            write.
        unrendered_messages: rows with a message whose content the chat template omits completely.
        untrained_calls: turns of only tool calls, which are not trained because the chat template
            does not write them.
        formats: number of rows in each format.
    """

    rows: int = 0
    turns: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut: int = 0
    dropped_overlong: int = 0
    dropped_untrained: int = 0
    dropped_equal: int = 0
    unwritten_tools: int = 0
    unwritten_reasoning: int = 0
    unrendered_messages: int = 0
    untrained_calls: int = 0
    formats: Counter[str] = field(default_factory=Counter)

    @property
    def prompt_tokens(self) -> int:
        """Input tokens without a loss."""
        return self.tokens - self.trained_tokens

    def summary(self) -> str:
        """Returns a one-line, human-readable summary."""
        counted = f"{self.rows:,} rows"
        counted = f"{self.turns:,} turns of {counted}" if self.turns else counted
        parts = [
            f"{self.samples:,} of {counted}",
            f"{self.trained_tokens:,} trained + {self.prompt_tokens:,} prompt tokens",
        ]
        notes = {
            "truncated to the length limit": self.cut,
            "dropped as too long": self.dropped_overlong,
            "dropped without a trained token": self.dropped_untrained,
            "dropped with identical responses": self.dropped_equal,
            "with tools the chat template does not write": self.unwritten_tools,
            "with reasoning the chat template does not write": self.unwritten_reasoning,
            "with messages the chat template does not write": self.unrendered_messages,
            "tool-call turns not trained, as the chat template does not write them": (
                self.untrained_calls
            ),
        }
        parts += [f"{count:,} {note}" for note, count in notes.items() if count]
        return ", ".join(parts) + (f" · format {self.format_text()}" if self.formats else "")

    def format_text(self) -> str:
        """Returns the formats of the rows, like `alpaca`, or `alpaca 900, sharegpt 100`."""
        if len(self.formats) == 1:
            return next(iter(self.formats))
        return ", ".join(f"{name} {count:,}" for name, count in self.formats.most_common())

    def note(self, *encoded: "Encoded") -> None:
        """Counts a row, given as its sequences, if the template omitted something of it."""
        self.unwritten_tools += not all(item.writes_tools for item in encoded)
        self.unwritten_reasoning += not all(item.writes_reasoning for item in encoded)
        self.unrendered_messages += not all(item.renders_content for item in encoded)
        self.untrained_calls += sum(item.untrained_calls for item in encoded)

    def discount(self, *encoded: "Encoded") -> None:
        """Removes a sample that `fit` has counted, with its sequences."""
        self.samples -= 1
        self.discount_tokens(*encoded)

    def discount_tokens(self, *encoded: "Encoded") -> None:
        """Removes the tokens of sequences that `fit` has counted."""
        self.tokens -= sum(len(item.token_ids) - 1 for item in encoded)
        self.trained_tokens -= sum(sum(item.mask) for item in encoded)

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return asdict(self) | {
            "prompt_tokens": self.prompt_tokens,
            "formats": dict(self.formats),
        }


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sequence rendered by the chat template and tokenized, with its loss mask.

    Attributes:
        location: location of the row.
        token_ids: token ids of the sequence.
        mask: whether each token is trained.
        writes_tools: False if the template did not write a tool or tool call of the row.
        writes_reasoning: False if the template did not write the reasoning of the last response.
        renders_content: False if the template omitted the complete content of a message.
        untrained_calls: number of turns that are not trained because they would be empty
            responses.
    """

    location: str
    token_ids: Sequence[int]
    mask: Sequence[bool]
    writes_tools: bool = True
    writes_reasoning: bool = True
    renders_content: bool = True
    untrained_calls: int = 0

    def sample(self) -> Sample:
        """Returns the sequence as a training sample."""
        return Sample.from_mask(self.token_ids, self.mask)

    def cut(self, length: int) -> "Encoded":
        """Returns the sequence truncated to its first `length` ids."""
        return replace(self, token_ids=self.token_ids[:length], mask=self.mask[:length])

    def after(self, length: int) -> "Encoded":
        """Returns the sequence without its first `length` ids."""
        return replace(self, token_ids=self.token_ids[length:], mask=self.mask[length:])


def prepare_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    overlong: TooLong = "cut",
    train_on: TrainOn = "assistant",
    split_turns: bool = False,
) -> tuple[list[Sample], PreparationStats]:
    """Encodes conversations with the tokenizer's chat template.

    Args:
        max_seq_len: maximum number of ids in a sample, including the last one, which is never an
            input.
        overlong: what to do with a sample that is too long: `cut` truncates it at the end, `drop`
            removes it.
        train_on: `assistant` trains the assistant's messages with their end-of-turn tokens, `all`
            trains every token.
        split_turns: make each response a separate sample, with its history as an untrained prompt.

    Returns:
        The samples, and counts of what became of the rows.

    Raises:
        ConfigError: `split_turns` is combined with `train_on="all"`.
        DataError: the template rejects a row (the message gives its location), or no trainable
            rows remain.
    """
    account = PreparationStats()
    encoded = encode_conversations(
        track(conversations, "preparing", unit="row"),
        tokenizer,
        account,
        max_seq_len=max_seq_len,
        overlong=overlong,
        train_on=train_on,
        split_turns=split_turns,
    )
    samples = [item.sample() for item in encoded]
    check_samples(account, max_seq_len)
    return samples, account


def encode_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    account: PreparationStats,
    *,
    max_seq_len: int,
    overlong: TooLong = "cut",
    train_on: TrainOn = "assistant",
    split_turns: bool = False,
) -> Iterator[Encoded]:
    """Yields the encoded sequences for `prepare_conversations`, and counts them in `account`."""
    if split_turns and train_on == "all":
        raise ConfigError(
            "split_turns trains each response once, which contradicts "
            'train_on="all"; choose one of them'
        )
    for conversation in conversations:
        account.rows += 1
        account.formats[conversation.format] += 1
        all_encoded = []
        for part in split_responses(conversation) if split_turns else (conversation,):
            account.turns += split_turns
            encoded = encode_messages(
                part.messages,
                part.tools,
                part.location,
                tokenizer,
                num_prompt=len(part.messages) - 1 if split_turns else 0,
                train_on=train_on,
            )
            all_encoded.append(encoded)
            kept = fit((encoded,), account, max_seq_len=max_seq_len, overlong=overlong)
            if kept is not None:
                yield kept[0]
        account.note(*all_encoded)


def split_responses(conversation: Conversation) -> Iterator[Conversation]:
    """Yields, for each trained assistant turn, the conversation up to and including it."""
    try:
        turns = trained_turns(conversation.messages)
    except DataError as error:
        raise DataError(f"{conversation.location}: {error}") from None
    for turn, is_trained in enumerate(turns):
        if is_trained:
            yield replace(conversation, messages=conversation.messages[: turn + 1])


def encode_messages(
    messages: list[Message],
    tools: list[JsonObject] | None,
    location: str,
    tokenizer: Tokenizer,
    *,
    num_prompt: int = 0,
    train_on: TrainOn = "assistant",
) -> Encoded:
    """Renders messages with the chat template and tokenizes them.

    Args:
        location: location of the row, for errors.
        num_prompt: number of messages at the beginning that are not trained, whatever their roles.

    Raises:
        DataError: there is no chat template, or it rejects the messages.
    """
    try:
        if train_on == "all":
            _refuse_masked(messages)
        encoded = tokenizer.encode_chat(
            messages,
            tools=tools,
            with_mask=train_on == "assistant",
            num_prompt=num_prompt,
            find_unrendered=True,
        )
    except DataError as error:
        raise DataError(f"{location}: {error}") from None
    ids, mask = encoded.token_ids, encoded.mask or [True] * len(encoded.token_ids)
    mask[:1] = [False] * len(mask[:1])  # nothing predicts the first token
    return Encoded(
        location,
        ids,
        mask,
        writes_tools=_writes_tools(messages, tools, encoded.text),
        writes_reasoning=_writes_reasoning(messages, encoded.text),
        renders_content=not encoded.unrendered,
        untrained_calls=encoded.untrained_calls,
    )


def fit(
    sequences: tuple[Encoded, ...],
    account: PreparationStats,
    *,
    max_seq_len: int,
    overlong: TooLong,
) -> tuple[Encoded, ...] | None:
    """Applies the length limit to the sequences of one sample, and counts the result in `account`.

    Args:
        sequences: one sequence, or the two of a preference pair.

    Returns:
        The sequences, truncated if needed, or None if the sample is dropped.
    """
    if max(len(encoded.token_ids) for encoded in sequences) > max_seq_len:
        if overlong == "drop":
            account.dropped_overlong += 1
            return None
        account.cut += 1
        sequences = tuple(encoded.cut(max_seq_len) for encoded in sequences)
    trained = [sum(encoded.mask) for encoded in sequences]
    if 0 in trained:
        account.dropped_untrained += 1
        return None
    if len(sequences) > 1 and all(e.token_ids == sequences[0].token_ids for e in sequences):
        account.dropped_equal += 1
        return None
    account.samples += 1
    account.tokens += sum(len(encoded.token_ids) - 1 for encoded in sequences)
    account.trained_tokens += sum(trained)
    return sequences


def check_samples(account: PreparationStats, max_seq_len: int) -> None:
    """Checks that at least one sample remains.

    Raises:
        DataError: no sample remains; the message suggests a fix.
    """
    if account.samples:
        return
    if account.dropped_overlong or account.cut:
        remedy = f"increase max_seq_len={max_seq_len}"
    elif account.dropped_equal:
        remedy = (
            "the responses are identical, or have equal scores, in every row: check how they were "
            "generated and scored"
        )
    elif account.dropped_untrained:
        remedy = (
            "no row has a trained response: check for empty responses and for messages of weight 0"
        )
        if account.untrained_calls:
            remedy = (
                "the responses are tool calls, which the chat template does not write: "
                "use a template that does"
            )
    elif account.rows:
        remedy = "none of their responses is trained: check for messages of weight 0"
    else:
        remedy = "the data files contain no rows: give others"
    raise DataError(f"no trainable rows remain ({account.summary()}); {remedy}")


def _refuse_masked(messages: list[Message]) -> None:
    for number, message in enumerate(messages):
        for key in TRAIN_KEYS:
            if message.get(key) is not None and not message[key]:
                raise DataError(
                    f"message {number} has {key} {message[key]!r}, but train_on: all trains every "
                    "token; set train_on: assistant, or remove the key"
                )


def _writes_tools(messages: list[Message], tools: list[JsonObject] | None, text: str) -> bool:
    """Returns whether the text contains the name of every tool offered and function called."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    names = [tool.get("function", tool).get("name") for tool in [*(tools or ()), *calls]]
    return all(name in text for name in names if isinstance(name, str))


def _writes_reasoning(messages: list[Message], text: str) -> bool:
    """Returns whether the text contains the reasoning of the last response.

    Templates omit the reasoning of earlier responses on purpose.
    """
    answers = [message for message in messages if message.get("role") == "assistant"]
    reasons = [answers[-1].get(key) for key in REASONING_KEYS] if answers else []
    return all(reason.strip() in text for reason in reasons if isinstance(reason, str))
