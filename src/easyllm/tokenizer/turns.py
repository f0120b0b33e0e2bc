"""Where the turns of a conversation stand in what a chat template rendered.

A template walks over the messages in a loop, so what a turn wrote is what was written while the loop was at its message:
`template` notes that for every loop (`Visit`). Nothing is rendered twice for it and nothing is compared, so neither equal
answers, nor dropped reasoning, nor a text that only the last turn gets can mislead it. Of that text the turn's header is
not the assistant's: it is what the template writes as the generation prompt.

Templates that do not iterate over the messages themselves (over indices, say, or over copies) are rendered again: shortened
to the messages before and up to the turn, or, where that does not give a prefix of the text, with the turn's words changed.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from easyllm.core.errors import DataError
from easyllm.tokenizer.template_budget import Visit

Messages = list[dict[str, Any]]
Span = tuple[int, int]
Render = Callable[[Messages, bool], tuple[str, list[Visit]]]
"""Renders messages, with the generation prompt where the flag says so."""

_QUESTION = [{"role": "user", "content": "?"}]
_PROBE_LENGTH = 3
MOST_DOUBTS = 4
_HEADER_ENDS = frozenset(">]|:")


def written_by_message(visits: Sequence[Visit]) -> dict[int, Span]:
    """Where each message that a loop was at wrote something; of several loops, the one that wrote the most counts."""
    loops: dict[int, dict[int, Span]] = defaultdict(dict)
    sizes: dict[int, int] = defaultdict(int)
    is_at: dict[int, Visit] = {}
    for visit in visits:
        begun = is_at.pop(visit.loop, None)
        if begun is not None and begun.message is not None and visit.position > begun.position:
            loops[visit.loop].setdefault(begun.message, (begun.position, visit.position))
            sizes[visit.loop] += visit.position - begun.position
        if visit.message is not None:
            is_at[visit.loop] = visit
    return loops[max(sizes, key=lambda loop: sizes[loop])] if sizes else {}


def unwritten_words(
    text: str, visits: Sequence[Visit], messages: Messages, render: Render
) -> list[int]:
    """The messages of whose words the template wrote nothing: the text is the same with other words in their place.

    Where the template's loop was at a message and the words are in what was written, nothing is rendered for it.

    Args: as of `TurnFinder`.
    """
    written = written_by_message(visits)
    finder = TurnFinder(text, visits, messages, render)
    found = []
    for number, message in enumerate(messages):
        words = message["content"].strip()
        begin, end = written.get(number, (0, 0))
        if words and words not in text[begin:end] and not finder.depends_on(number):
            found.append(number)
    return found


def first_unwritten(
    text: str, visits: Sequence[Visit], messages: Messages, render: Render
) -> int | None:
    """The first message that is not the assistant's and of whose words the template wrote nothing; None where there is none.

    For prompts, whoever sends them: words are looked for in the order of the messages, and at most `MOST_DOUBTS` messages
    are rendered again to tell; the ones after that count as written.

    Args:
        render: as `text` was rendered, with the generation prompt or without.
    """
    written = written_by_message(visits)
    finder = TurnFinder(text, visits, messages, render)
    place = doubts = 0
    for number, message in enumerate(messages):
        words = message["content"].strip()
        if not words or message["role"] == "assistant":
            continue
        begin, end = written.get(number, (place, len(text)))
        at = text.find(words, begin, end)
        if at >= 0:
            place = max(place, at)
            continue
        doubts += 1
        if doubts > MOST_DOUBTS:
            return None
        if not finder.depends_on(number):
            return number
    return None


def unwritten_calls(
    text: str, messages: Messages, turns: Sequence[int], render: Render
) -> list[int]:
    """Of `turns`, those that are tool calls without words, if the template writes none of the calls."""
    silent = [
        t for t in turns if messages[t].get("tool_calls") and not messages[t]["content"].strip()
    ]
    if not silent:
        return []
    bare = [
        {
            key: value
            for key, value in message.items()
            if key != "tool_calls" or number not in silent
        }
        for number, message in enumerate(messages)
    ]
    try:
        without, _ = render(bare, False)
    except DataError:  # it refuses an empty answer, so it looked at the calls
        return []
    return silent if without == text else []


class TurnFinder:
    """Finds the assistant's turns in a rendering.

    Args:
        text: the messages as the template renders them, without a generation prompt.
        visits: what the rendering noted.
        render: renders other messages in the same way.
    """

    def __init__(
        self, text: str, visits: Sequence[Visit], messages: Messages, render: Render
    ) -> None:
        self._text, self._messages, self._render = text, messages, render
        self._written = written_by_message(visits)

    def find(self, turn: int) -> Span:
        """The characters of an assistant turn: all that the template writes for it, without its header.

        Raises:
            DataError: they cannot be found.
        """
        found = self._from_visits(turn) or self._from_prefixes(turn) or self._from_change(turn)
        if found is None:
            raise DataError(
                f"assistant turn {turn} cannot be found in what the chat template renders; "
                "put {% generation %} marks around the assistant's words in the template"
            )
        return found

    def depends_on(self, number: int) -> bool:
        """Whether a message's words are in the text: whether it is another one with other words."""
        try:
            return self._with_other_words(number) != self._text
        except DataError:  # it looks at the words; whether it writes them is told by the text
            return bool(self._messages[number]["content"].strip() in self._text)

    @cached_property
    def _prompt(self) -> str:
        """What the template writes as the generation prompt; nothing where that cannot be told."""
        for messages in (_QUESTION, self._messages):  # a template may refuse a single question
            try:
                (without, _), (text, _) = (
                    self._render(messages, False),
                    self._render(messages, True),
                )
            except DataError:
                continue
            return text.removeprefix(without) if text.startswith(without) else ""
        return ""

    def _from_visits(self, turn: int) -> Span | None:
        if turn not in self._written:
            return None
        begin, end = self._written[turn]
        if self._prompt and self._text.startswith(self._prompt, begin, end):
            return begin + len(self._prompt), end
        before = self._prefix(self._messages[:turn], prompt=True)
        if before is not None and begin <= before <= end:
            return before, end
        return self._after_header(turn, begin, end), end

    def _after_header(self, turn: int, begin: int, end: int) -> int:
        """Where the turn's header ends, if the generation prompt is not simply what comes first.

        A default system prompt may be written before the header, in the same step of the loop, and the generation prompt
        may continue after the header (with `<think>`, say) as this turn does not.
        """
        changed = self._changed(turn)
        words = end if changed is None else min(max(changed[0], begin), end)
        for length in range(len(self._prompt), 0, -1):
            is_whole = length == len(self._prompt)
            last = self._prompt[length - 1]
            if not (is_whole or last.isspace() or last in _HEADER_ENDS):
                continue
            at = self._text.find(self._prompt[:length], begin, words)
            if at >= 0:
                return at + length
        return begin

    def _from_prefixes(self, turn: int) -> Span | None:
        before = self._prefix(self._messages[:turn], prompt=True)
        after = self._prefix(self._messages[: turn + 1], prompt=False)
        if before is None or after is None or before > after:
            return None
        return before, after

    def _from_change(self, turn: int) -> Span | None:
        """Where the text changes if the turn's content does; only for turns that are nothing but content."""
        message = self._messages[turn]
        if message.get("tool_calls") or not message["content"].strip():
            return None
        changed = self._changed(turn)
        return changed if changed is not None and changed[0] < changed[1] else None

    def _prefix(self, messages: Messages, *, prompt: bool) -> int | None:
        """The length of what `messages` are rendered as, if the text begins with it."""
        try:
            part, _ = self._render(messages, prompt)
        except DataError:  # a template may refuse a conversation cut short
            return None
        return len(part) if self._text.startswith(part) else None

    def _changed(self, turn: int) -> Span | None:
        """The characters that differ when the turn's content is exchanged; None where none do, or the change is refused."""
        try:
            other = self._with_other_words(turn)
        except DataError:
            return None
        if other == self._text:
            return None
        start = _num_equal(self._text, other)
        tail = _num_equal(reversed(self._text), reversed(other))
        return start, max(start, len(self._text) - tail)

    def _with_other_words(self, number: int) -> str:
        """The text that the template writes with the content of a message exchanged."""
        content = self._messages[number]["content"].strip()
        # a character the content and the prompt lack, so that they differ at the content's first and last character
        known = content + self._prompt + self._text[-1:]
        probe = next(c for c in map(chr, range(ord("A"), 0x110000)) if c not in known)
        message = self._messages[number] | {"content": probe * _PROBE_LENGTH}
        messages = [*self._messages[:number], message, *self._messages[number + 1 :]]
        return self._render(messages, False)[0]


def _num_equal(first: Any, second: Any) -> int:
    """How many characters two texts have in common at their beginning."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
