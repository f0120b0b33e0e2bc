"""Conversations to samples: template, loss mask, length limit, and an account of what happened.

A conversation of several turns is one sample by default: every answer is trained once, and what was said before is
computed once. Split, each answer is a sample of its own behind its history. The answers trained are the same, and since
the loss of a step is a mean over its tokens, so are their weights. (Training the answers in the history as well would
count the early ones again with every later turn.) Splitting is for templates that write a turn otherwise once
others follow it, as those do that drop old reasoning, and costs the history again for each turn.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from easyllm.core.errors import ConfigError, DataError
from easyllm.core.progress import track
from easyllm.data.conversations import Conversation, Message
from easyllm.data.packing import Sample
from easyllm.tokenizer.messages import TRAIN_KEYS, trained_turns
from easyllm.tokenizer.tokenizer import Tokenizer

Overlong = Literal["cut", "drop"]
TrainOn = Literal["assistant", "all"]
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that templates read its reasoning from, each its own one."""


@dataclass(slots=True)
class Account:
    """What became of the rows, reported before the first step.

    Attributes:
        turns: answers the rows were split into; 0 when they were not.
        tokens: inputs of the samples; of these `trained_tokens` predict a trained one.
        cut: samples cut at the length limit, and kept.
        dropped_equal: preference pairs whose answers are the same.
        unwritten_tools: rows with a tool or tool call whose name the chat template does not write.
        unwritten_reasoning: rows whose last answer has a reasoning that the chat template does not write.
        unwritten_words: rows with a message of whose words the chat template writes nothing.
        untrained_calls: turns that are tool calls alone, which the chat template does not write: they are not trained.
        formats: rows of each format.
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
    unwritten_words: int = 0
    untrained_calls: int = 0
    formats: Counter[str] = field(default_factory=Counter)

    @property
    def prompt_tokens(self) -> int:
        return self.tokens - self.trained_tokens

    def summary(self) -> str:
        """One line for people."""
        counted = f"{self.turns} turns of {self.rows} rows" if self.turns else f"{self.rows} rows"
        parts = [
            f"{self.samples} of {counted}",
            f"{self.trained_tokens} trained + {self.prompt_tokens} prompt tokens",
        ]
        notes = {
            "cut at the length limit": self.cut,
            "over the length limit dropped": self.dropped_overlong,
            "without a trained token dropped": self.dropped_untrained,
            "with equal answers dropped": self.dropped_equal,
            "with tools the chat template does not write": self.unwritten_tools,
            "with reasoning the chat template does not write": self.unwritten_reasoning,
            "with messages the chat template does not write": self.unwritten_words,
            "turns of tool calls the chat template does not write, not trained": self.untrained_calls,
        }
        parts += [f"{count} {note}" for note, count in notes.items() if count]
        return ", ".join(parts) + (f" · format {self.format_text()}" if self.formats else "")

    def format_text(self) -> str:
        """`alpaca`, or `alpaca 900, sharegpt 100`."""
        if len(self.formats) == 1:
            return next(iter(self.formats))
        return ", ".join(f"{name} {count}" for name, count in self.formats.most_common())

    def note(self, *encoded: "Encoded") -> None:
        """Counts the row of which these are the sequences, if the template left something of it out."""
        self.unwritten_tools += not all(item.writes_tools for item in encoded)
        self.unwritten_reasoning += not all(item.writes_reasoning for item in encoded)
        self.unwritten_words += not all(item.writes_words for item in encoded)
        self.untrained_calls += sum(item.untrained_calls for item in encoded)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {
            "prompt_tokens": self.prompt_tokens,
            "formats": dict(self.formats),
        }


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sequence under the chat template: its ids, and for each whether it is trained.

    `writes_tools` is False where the template did not write a tool or tool call it was given, `writes_reasoning` where it
    did not write the reasoning of the last answer, `writes_words` where it wrote nothing of a message's words.
    `untrained_calls` are the turns that are not trained since they would be empty answers.
    """

    place: str
    token_ids: Sequence[int]
    mask: Sequence[bool]
    writes_tools: bool = True
    writes_reasoning: bool = True
    writes_words: bool = True
    untrained_calls: int = 0

    def sample(self) -> Sample:
        """As training takes it."""
        return Sample.from_mask(self.token_ids, self.mask)

    def cut(self, length: int) -> "Encoded":
        """The first `length` ids."""
        return replace(self, token_ids=self.token_ids[:length], mask=self.mask[:length])

    def behind(self, length: int) -> "Encoded":
        """What follows the first `length` ids."""
        return replace(self, token_ids=self.token_ids[length:], mask=self.mask[length:])


def prepare_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    overlong: Overlong = "cut",
    train_on: TrainOn = "assistant",
    split_turns: bool = False,
) -> tuple[list[Sample], Account]:
    """Samples of conversations under the tokenizer's chat template.

    Args:
        max_seq_len: most ids a sample may have, the last one (never an input) included.
        overlong: what happens to a longer one: `cut` at the end, or `drop`.
        train_on: the assistant's words with the end of their turns, or every token.
        split_turns: each answer becomes a sample of its own, its history an untrained prompt.

    Raises:
        ConfigError: `split_turns` with `train_on="all"`.
        DataError: the template refuses a row (its place is named), or nothing is left to train.
    """
    account = Account()
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
    account: Account,
    *,
    max_seq_len: int,
    overlong: Overlong = "cut",
    train_on: TrainOn = "assistant",
    split_turns: bool = False,
) -> Iterator[Encoded]:
    """What `prepare_conversations` makes samples of, one after the other, counted in `account`."""
    if split_turns and train_on == "all":
        raise ConfigError(
            'split_turns trains each answer once, which train_on="all" contradicts; choose one of them'
        )
    for conversation in conversations:
        account.rows += 1
        account.formats[conversation.format] += 1
        all_encoded = []
        for part in answers_of(conversation) if split_turns else (conversation,):
            account.turns += split_turns
            encoded = encode_messages(
                part.messages,
                part.tools,
                part.place,
                tokenizer,
                num_prompt=len(part.messages) - 1 if split_turns else 0,
                train_on=train_on,
            )
            all_encoded.append(encoded)
            kept = fit((encoded,), account, max_seq_len=max_seq_len, overlong=overlong)
            if kept is not None:
                yield kept[0]
        account.note(*all_encoded)


def answers_of(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation up to each of its assistant turns that is trained."""
    try:
        turns = trained_turns(conversation.messages)
    except DataError as error:
        raise DataError(f"{conversation.place}: {error}") from None
    for turn, is_trained in enumerate(turns):
        if is_trained:
            yield replace(conversation, messages=conversation.messages[: turn + 1])


def encode_messages(
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    place: str,
    tokenizer: Tokenizer,
    *,
    num_prompt: int = 0,
    train_on: TrainOn = "assistant",
) -> Encoded:
    """Messages under the chat template.

    Args:
        place: of the row, for errors.
        num_prompt: messages at the beginning that are not trained, whoever speaks in them.

    Raises:
        DataError: the template refuses the messages, or there is none.
    """
    try:
        if train_on == "all":
            _refuse_masked(messages)
        encoded = tokenizer.encode_chat(
            messages,
            tools=tools,
            with_mask=train_on == "assistant",
            num_prompt=num_prompt,
            check_words=True,
        )
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    ids, mask = encoded.token_ids, encoded.mask or [True] * len(encoded.token_ids)
    mask[:1] = [False] * len(mask[:1])  # nothing predicts the first token
    return Encoded(
        place,
        ids,
        mask,
        writes_tools=_writes_tools(messages, tools, encoded.text),
        writes_reasoning=_writes_reasoning(messages, encoded.text),
        writes_words=not encoded.unwritten,
        untrained_calls=encoded.untrained_calls,
    )


def fit(
    sequences: tuple[Encoded, ...], account: Account, *, max_seq_len: int, overlong: Overlong
) -> tuple[Encoded, ...] | None:
    """The sequences of one sample (two where answers are compared) within the limit, counted; None when dropped."""
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


def check_samples(account: Account, max_seq_len: int) -> None:
    """Raises where no sample is left, and says what would fix it."""
    if account.samples:
        return
    if account.dropped_overlong or account.cut:
        remedy = f"raise max_seq_len={max_seq_len}"
    elif account.dropped_equal:
        remedy = "chosen and rejected are the same in every row: check how the pairs were made"
    elif account.dropped_untrained:
        remedy = "no row has an answer that is trained: check for empty answers and for messages of weight 0"
        if account.untrained_calls:
            remedy = "the answers are tool calls, which the chat template does not write: take one that does"
    elif account.rows:
        remedy = "no answer in them is trained: check for messages of weight 0"
    else:
        remedy = "the data files hold no rows: name others"
    raise DataError(f"no row is left to train on ({account.summary()}); {remedy}")


def num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _refuse_masked(messages: list[Message]) -> None:
    for number, message in enumerate(messages):
        for key in TRAIN_KEYS:
            if message.get(key) is not None and not message[key]:
                raise DataError(
                    f"message {number} has {key} {message[key]!r}, but train_on: all trains every token; "
                    "set train_on: assistant, or remove the key"
                )


def _writes_tools(messages: list[Message], tools: list[dict[str, Any]] | None, text: str) -> bool:
    """Whether the text names every tool offered and every function called."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    names = [tool.get("function", tool).get("name") for tool in [*(tools or ()), *calls]]
    return all(name in text for name in names if isinstance(name, str))


def _writes_reasoning(messages: list[Message], text: str) -> bool:
    """Whether the reasoning of the last answer is in the text; templates leave that of earlier ones out on purpose."""
    answers = [message for message in messages if message.get("role") == "assistant"]
    reasons = [answers[-1].get(key) for key in REASONING_KEYS] if answers else []
    return all(reason.strip() in text for reason in reasons if isinstance(reason, str))
