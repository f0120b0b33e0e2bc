"""Prompts of a load test: random words of an exact number of tokens, or the rows of a file."""

import asyncio
import itertools
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from easyllm.core.errors import ConfigError, DataError, SourceError
from easyllm.core.json_types import Json, JsonObject
from easyllm.serve.http_client import HTTPClient
from easyllm.serve.http_response import HTTPFailure

Dialect = Literal["chat", "completions"]
Count = Callable[[JsonObject], Awaitable[int | None]]
"""Sends a prompt, and returns the number of tokens that the server counts; None if it does not."""
_FREQUENT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water mother area money story fact month lot right study book "
    "eye job word business issue side kind head service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face others level office health person art war history party result change "
    "morning reason research girl guy moment air teacher force education"
)
WORDS = tuple(_FREQUENT.split())
"""Frequent English words: one token each, after a space, in most vocabularies."""
START = "The"
MIN_WORDS = 20
MAX_PROBES = 6
NUM_AT_ONCE = 16


class RandomPrompts:
    """Prompts of random words, each different from its second word on.

    Args:
        words: the words to choose from.
        count: number of words after the first.
        dialect: form of the prompts.
        seed: seed of the choice.
    """

    def __init__(self, words: Sequence[str], count: int, dialect: Dialect, seed: int) -> None:
        self.words, self.count, self._dialect = words, count, dialect
        self._random = random.Random(seed)

    def __iter__(self) -> Iterator[JsonObject]:
        while True:
            yield self.next()

    def next(self) -> JsonObject:
        """Returns the field of a request that contains the next prompt."""
        chosen = self._random.choices(self.words, k=self.count)
        return as_field(" ".join((START, *chosen)), self._dialect)


def as_field(text: str, dialect: Dialect) -> JsonObject:
    """Returns a text as the prompt of a request."""
    if dialect == "completions":
        return {"prompt": text}
    return {"messages": [{"role": "user", "content": text}]}


async def fit_length(prompts: RandomPrompts, target: int, count: Count) -> list[str]:
    """Changes the number of words until the server counts `target` tokens.

    Returns:
        Notes on what could not be done, for the report.

    Raises:
        ConfigError: the chat template alone has more tokens.
    """
    prompts.count = max(1, target // 8)  # a tokenizer may need several tokens for each word
    slope: float | None = None
    before: tuple[int, int] | None = None
    for _ in range(MAX_PROBES):
        found = await count(prompts.next())
        if found is None:
            prompts.count = max(1, target - 1)
            return ["the server does not count the tokens of prompts: they have one word per token"]
        if found == target:
            return []
        if prompts.count == 1 and found > target:
            raise ConfigError(
                f"a prompt of two words has {found} tokens, chat template included; "
                f"set --prompt-tokens to at least {found}"
            )
        if before is not None and before[0] != prompts.count:
            slope = max(0.2, (found - before[1]) / (prompts.count - before[0]))
        before = (prompts.count, found)
        if slope is not None:
            prompts.count = max(1, prompts.count + round((target - found) / slope))
        else:
            prompts.count = 2 * prompts.count if found < target else 1
    return [f"prompts have about {target} tokens: this tokenizer splits some of the words"]


async def one_token_words(client: HTTPClient, model: str) -> Sequence[str]:
    """Returns the words that are one token each; all words if the server does not tell."""
    base = await _num_tokens(client, model, START)
    if base is None:
        return WORDS
    whole = await _num_tokens(client, model, " ".join((START, *WORDS)))
    if whole == base + len(WORDS):
        return WORDS
    found = list[str]()
    for start in range(0, len(WORDS), NUM_AT_ONCE):
        words = WORDS[start : start + NUM_AT_ONCE]
        texts = (f"{START} {word}" for word in words)
        counts = await asyncio.gather(*(_num_tokens(client, model, text) for text in texts))
        found += [word for word, number in zip(words, counts, strict=True) if number == base + 1]
    return found if len(found) >= MIN_WORDS else WORDS


async def _num_tokens(client: HTTPClient, model: str, text: str) -> int | None:
    """Returns the length of a text by `POST /tokenize`, as vLLM and llama.cpp define it."""
    bodies: tuple[JsonObject, ...] = (
        {"model": model, "prompt": text, "add_special_tokens": False},
        {"content": text},
    )
    for body in bodies:
        try:
            status, answer = await client.request("POST", "/tokenize", json.dumps(body).encode())
            tokens: Json = json.loads(answer).get("tokens") if status == 200 else None
        except (HTTPFailure, ValueError, AttributeError):
            return None
        if isinstance(tokens, list) and tokens:
            return len(tokens)
    return None


def read_prompts(path: Path, dialect: Dialect) -> Iterator[JsonObject]:
    """Yields the prompts of a file for ever, from its beginning again after its end.

    Args:
        path: JSON lines with `prompt` (text) or `messages` (a list), or text with a prompt a line.
        dialect: form of the prompts.

    Raises:
        SourceError: there is no such file.
        DataError: the file has no prompt, or a row has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise SourceError(f"cannot read {path} ({error.strerror}); give another file") from None
    is_json = path.suffix in (".jsonl", ".json", ".ndjson")
    rows = [
        _row(line, f"{path}:{number}", dialect) if is_json else as_field(line, dialect)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path} contains no prompt; write one a line")
    return itertools.cycle(rows)


def _row(line: str, location: str, dialect: Dialect) -> JsonObject:
    """Returns the prompt in a JSON line."""
    try:
        row: Json = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(f'{location} is not a JSON object; write {{"prompt": "…"}}')
    if isinstance(row.get("prompt"), str):
        return as_field(row["prompt"], dialect)
    if not isinstance(row.get("messages"), list):
        raise DataError(f"{location} has neither prompt nor messages; add one of them")
    if dialect == "completions":
        raise DataError(f"{location} has messages, which need --dialect chat")
    return {"messages": row["messages"]}
