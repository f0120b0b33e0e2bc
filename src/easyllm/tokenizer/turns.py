"""Locating the turns of a conversation in the text that a chat template rendered.

A template iterates over the messages in a loop, so the text of a turn is what was written while the
loop was at its message. `template` records this for every loop (`Visit`). This needs no second
rendering and no text comparison, so it is not affected by identical responses, by dropped
reasoning, or by text that is written only for the last turn. The header of the turn, which the
template also writes as the generation prompt, does not belong to the assistant's text.

Templates that do not iterate over the messages themselves (but over indices or copies, for example)
are rendered again: with only the messages before the turn and up to the turn or, if that does not
give a prefix of the text, with the content of the turn replaced.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.core.sequences import num_equal
from easyllm.tokenizer.template_budget import Visit

Messages = list[JsonObject]
Span = tuple[int, int]
Render = Callable[[Messages, bool], tuple[str, list[Visit]]]
"""Renders messages, with the generation prompt if the flag is set; also returns the visits."""

_QUESTION = [{"role": "user", "content": "?"}]
_PROBE_LENGTH = 3
MAX_RERENDERED = 4
"""Maximum number of messages that `first_unrendered` renders again."""
_HEADER_ENDS = frozenset(">]|:")


def spans_by_message(visits: Sequence[Visit]) -> dict[int, Span]:
    """Returns the span of the text that each message wrote, by message index.

    If the template has several loops over the messages, the loop that wrote the most text is used.
    """
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


def first_unrendered(
    text: str, visits: Sequence[Visit], messages: Messages, render: Render
) -> int | None:
    """Returns the index of the first message whose content was not rendered, or None.

    Assistant messages are not checked. The function is for untrusted prompts, so its cost is
    bounded: contents are searched for in the order of the messages, and at most `MAX_RERENDERED`
    messages are tested by rendering again; all later ones count as rendered.

    Args:
        text: the rendered text.
        visits: the visits recorded by the rendering.
        messages: the rendered messages.
        render: renders messages in the same way as `text`, with or without the generation prompt.
    """
    written = spans_by_message(visits)
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
        if doubts > MAX_RERENDERED:
            return None
        if not finder.depends_on(number):
            return number
    return None


def unrendered_calls(
    text: str, messages: Messages, turns: Sequence[int], render: Render
) -> list[int]:
    """Returns those of `turns` that contain only tool calls, if the template renders no calls."""
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
    except DataError:  # it rejects an empty turn, so it reads the calls
        return []
    return silent if without == text else []


class TurnFinder:
    """Locates assistant turns, and messages that are missing, in a rendered conversation.

    Args:
        text: the messages as the template renders them, without a generation prompt.
        visits: the visits recorded by the rendering.
        messages: the rendered messages.
        render: renders other messages in the same way.
    """

    def __init__(
        self, text: str, visits: Sequence[Visit], messages: Messages, render: Render
    ) -> None:
        self._text, self._visits, self._messages, self._render = text, visits, messages, render

    def find(self, turn: int) -> Span:
        """Returns the span of an assistant turn: the text written for it, without its header.

        Args:
            turn: index of the message.

        Raises:
            DataError: the turn cannot be located.
        """
        found = self._from_visits(turn) or self._from_prefixes(turn) or self._from_change(turn)
        if found is None:
            raise DataError(
                f"assistant turn {turn} cannot be located in the text that the chat template "
                "renders; put {% generation %} marks around the assistant's content in the template"
            )
        return found

    def unrendered(self) -> list[int]:
        """Returns the indices of messages whose content the template did not render.

        For such a message, the text does not change when its content is replaced. This is tested by
        rendering again, except for messages whose content is found in the text that the template's
        loop wrote for them.
        """
        found = []
        for number, message in enumerate(self._messages):
            words = message["content"].strip()
            begin, end = self._written.get(number, (0, 0))
            if words and words not in self._text[begin:end] and not self.depends_on(number):
                found.append(number)
        return found

    def depends_on(self, number: int) -> bool:
        """Whether the content of a message is rendered: whether replacing it changes the text."""
        try:
            return self._with_other_words(number) != self._text
        except DataError:  # the template reads the content; the text shows whether it renders it
            return bool(self._messages[number]["content"].strip() in self._text)

    @cached_property
    def _written(self) -> dict[int, Span]:
        """The span that each message wrote, by message index."""
        return spans_by_message(self._visits)

    @cached_property
    def _prompt(self) -> str:
        """The generation prompt that the template writes; empty if it cannot be determined."""
        for messages in (_QUESTION, self._messages):  # a template may reject a single question
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
        """Returns where a turn's header ends if the turn does not start with the generation prompt.

        A default system prompt may be written before the header in the same loop iteration, and the
        generation prompt may continue after the header in a way this turn does not (with `<think>`,
        for example).
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
        """Returns the span that changes with the turn's content; only for turns without calls."""
        message = self._messages[turn]
        if message.get("tool_calls") or not message["content"].strip():
            return None
        changed = self._changed(turn)
        return changed if changed is not None and changed[0] < changed[1] else None

    def _prefix(self, messages: Messages, *, prompt: bool) -> int | None:
        """Returns the length of the rendering of `messages` if it is a prefix of the text."""
        try:
            part, _ = self._render(messages, prompt)
        except DataError:  # a template may reject a truncated conversation
            return None
        return len(part) if self._text.startswith(part) else None

    def _changed(self, turn: int) -> Span | None:
        """Returns the span that differs when the turn's content is replaced.

        The result is None if nothing differs, or if the template rejects the new content.
        """
        try:
            other = self._with_other_words(turn)
        except DataError:
            return None
        if other == self._text:
            return None
        start = num_equal(self._text, other)
        tail = num_equal(reversed(self._text), reversed(other))
        return start, max(start, len(self._text) - tail)

    def _with_other_words(self, number: int) -> str:
        """Returns the text rendered with the content of a message replaced."""
        content = self._messages[number]["content"].strip()
        # the probe character occurs in neither the content nor the prompt, so the texts differ at
        # the first and at the last character of the content
        known = content + self._prompt + self._text[-1:]
        probe = next(c for c in map(chr, range(ord("A"), 0x110000)) if c not in known)
        message = self._messages[number] | {"content": probe * _PROBE_LENGTH}
        messages = [*self._messages[:number], message, *self._messages[number + 1 :]]
        return self._render(messages, False)[0]
