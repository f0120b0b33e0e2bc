"""Guided decoding: compiles guides to token masks with llguidance.

llguidance walks the tokens of a vocabulary, stored as a trie of their bytes, through an Earley
parser whose terminals are derivatives of regular expressions, and returns the tokens with which
some accepted text continues.

A completed guide allows only EOS; one that may also continue allows EOS among others. What cannot
be honoured exactly is refused when the guide is compiled; nothing is ignored.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from easyllm.core.json_types import Json
from easyllm.engine.guide_grammar import guide_grammar, with_checked_schemas
from easyllm.engine.guide_spec import GuideError, GuideSpec
from easyllm.engine.guide_vocabulary import VocabularyBytes
from easyllm.engine.request import MaskSource, TokenMask
from easyllm.tokenizer.tokenizer import Tokenizer

CACHE_SIZE = 128
"""Number of compiled guides to keep."""
MAX_THREADS = 8
LIMITS = LLParserLimits(max_lexer_states=100_000, verbose_errors=False)
"""Bounds of the work for one guide and for one mask, in units of llguidance; a mask that exceeds
them ends its completion as cancelled."""
OPTIONS = '%llguidance {"no_forcing": true}\n'
"""A token is not forced where only one text is possible: the model chooses among the tokenizations
of this text. Forcing would call the Python tokenizer from llguidance's threads, and SentencePiece
tokenizers put a blank before the text."""


WORDS = ["[a-z]{1,30}", " [a-z]{1,30}"]
"""Sets of tokens that llguidance allows at once where a whole set may follow, in addition to its
own for texts in JSON: masks of expressions with words take a quarter less time."""


class Guides:
    """Compiles guides for one tokenizer; may be used from several threads at once.

    Args:
        tokenizer: the tokenizer of the model.
        vocab_size: number of ids of the model; ids without a token are never allowed.
        eos_ids: the model's EOS ids, with which a guided completion ends.

    Raises:
        GuideError: there is no EOS id, or the bytes of tokens depend on their neighbours.

    Example:
        guides = Guides(tokenizer, vocab_size=model.config.vocab_size, eos_ids=(2,))
        request = Request(..., mask=guides.compile(GuideSpec(regex="[0-9]{4}")))
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self._vocabulary = VocabularyBytes(tokenizer, vocab_size, eos_ids)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(self._vocabulary),
            eos_token=list(self._vocabulary.eos_ids),
            slices=WORDS + LLTokenizer.general_slices(),
        )
        self._masks = _MaskComputer(self._vocabulary)
        self._compiled: OrderedDict[str, _Guide] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: GuideSpec, *, wrap: Callable[[str], str] | None = None) -> MaskSource:
        """Returns the masks of a guide, from the cache if it was compiled before.

        Args:
            spec: the guide.
            wrap: makes its grammar part of another one, such as one with reasoning before it:
                Lark, or llguidance's JSON form of several grammars.

        Raises:
            GuideError: the guide is too complex, accepts no text, or contains something that cannot
                be honoured; the message names it.
        """
        if wrap is None:
            return self._cached(spec.key, lambda: self._grammar(spec))
        grammar = wrap(self._grammar(spec))
        return self._cached(f"wrapped:{grammar}", lambda: grammar)

    def compile_lark(self, text: str) -> MaskSource:
        """Returns the masks of a grammar of our own, which may name special tokens.

        Args:
            text: a grammar in llguidance's dialect of Lark. The schemas in it (`%json {...}`) may
                come from users: they are checked as by `compile`.

        Raises:
            GuideError: as for `compile`.
        """
        return self._cached(f"lark:{text}", lambda: with_checked_schemas(text))

    def _cached(self, key: str, grammar: Callable[[], str]) -> MaskSource:
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found
        # without the lock: a large guide must not hold up the requests of others
        made = self._build(grammar())
        with self._lock:
            self._compiled[key] = made
            while len(self._compiled) > CACHE_SIZE:
                self._compiled.popitem(last=False)
        return made

    def _build(self, grammar: str) -> "_Guide":
        with _panics_as_errors():
            matcher = LLMatcher(self._tokenizer, _with_options(grammar), log_level=0, limits=LIMITS)
            warnings = [] if matcher.is_error() else matcher.get_grammar_warnings()
            if not matcher.is_error():
                matcher.compute_bitmask()  # also finds out whether any token can begin
        if matcher.is_error():
            raise _error_of(matcher.get_error())
        if warnings:
            raise _error_of(warnings[0])
        return _Guide(matcher, self._masks)

    def _grammar(self, spec: GuideSpec) -> str:
        """Returns the grammar of a guide, after checking that its texts can be spelled."""
        for text in _needed_texts(spec):
            if missing := self._vocabulary.missing_characters(text):
                raise GuideError(
                    f"the model's tokenizer has no token for {missing[0]!r}, which {text[:60]!r} "
                    "contains; leave it out, or use a model whose tokenizer has all bytes"
                )
        return guide_grammar(spec)


def _with_options(grammar: str) -> str:
    """Returns a grammar with `OPTIONS`, in Lark or in each Lark grammar of the JSON form."""
    if not grammar.startswith("{"):
        return OPTIONS + grammar
    whole = json.loads(grammar)
    for each in whole["grammars"]:
        if "lark_grammar" in each:
            each["lark_grammar"] = OPTIONS + each["lark_grammar"]
    return json.dumps(whole, ensure_ascii=False)


class _Guide:
    """A compiled guide: a matcher that has read nothing, copied for each completion."""

    def __init__(self, matcher: LLMatcher, masks: "_MaskComputer") -> None:
        self._matcher, self._masks = matcher, masks
        self._lock = threading.Lock()  # a matcher may not be used by two threads at once

    def start(self) -> TokenMask:
        """Returns the mask of a completion that has no token yet."""
        with self._lock:
            return GuideMask(self._matcher.deep_copy(), self._masks)


class GuideMask:
    """The tokens that a guide allows next in one completion.

    Args:
        matcher: the state of the guide.
        computer: computes the masks of several completions at once.

    Attributes:
        words: the next mask, if it is computed already.
    """

    def __init__(self, matcher: LLMatcher, computer: "_MaskComputer") -> None:
        self.matcher, self.computer = matcher, computer
        self.words: Tensor | None = None
        self._ended = False

    def mask(self) -> Tensor:
        """Returns a bitmask [⌈V/32⌉] int32 of the tokens allowed next; none after EOS.

        Raises:
            GuideError: the state is too complex, or no token of the vocabulary continues the text.
        """
        if self._ended:
            return torch.zeros(self.computer.num_words, dtype=torch.int32)
        if self.words is None:
            self.computer.compute([self])
        # after an error, llguidance allows EOS, which would look like a regular end
        if self.matcher.is_error():
            raise _error_of(self.matcher.get_error())
        assert self.words is not None, "it was computed"
        return self.words

    def allows(self, token_id: int) -> bool:
        """Whether a token is certainly allowed next; much faster than the whole mask."""
        if self._ended or self.matcher.is_error():
            return False
        if token_id in self.computer.eos_ids:
            return self.matcher.is_accepting()
        return self.computer.is_known(token_id) and self.matcher.validate_tokens([token_id]) == 1

    def advance(self, token_id: int) -> None:
        """Reads a token that was appended to the completion.

        Raises:
            GuideError: the guide does not allow it.
        """
        self.words = None
        self._ended = self._ended or token_id in self.computer.eos_ids
        if not self.matcher.consume_token(token_id):
            raise _error_of(self.matcher.get_error())


class _MaskComputer:
    """Computes the masks of several completions in parallel, without the interpreter's lock."""

    def __init__(self, vocabulary: VocabularyBytes) -> None:
        self._tokens = vocabulary.tokens
        self.num_words = -(-len(self._tokens) // 32)
        self.eos_ids = frozenset(vocabulary.eos_ids)
        self._known = vocabulary.known_words()
        self._executor = LLExecutor(num_threads=min(torch.get_num_threads(), MAX_THREADS))

    def is_known(self, token_id: int) -> bool:
        """Whether an id has a token."""
        return token_id < len(self._tokens) and bool(self._tokens[token_id])

    def compute(self, masks: Sequence[GuideMask]) -> None:
        """Computes the next mask of each completion and stores it in `words`."""
        words = torch.zeros((len(masks), self.num_words), dtype=torch.int32)
        self._executor.unsafe_compute_mask_ptr(
            [(mask.matcher, row) for row, mask in enumerate(masks)],
            words.data_ptr(),
            self.num_words * words.itemsize,
            len(masks),
        )
        if self._known is not None:
            words &= self._known
        for mask, row in zip(masks, words, strict=True):
            mask.words = row


def _needed_texts(spec: GuideSpec) -> Iterator[str]:
    """Yields texts that a completion, or a value in it, may have to contain."""
    yield from spec.choice
    pending: list[Json] = [spec.json_schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            texts = [node.get("const"), *_listed(node.get("required"))]
            yield from (text for text in texts if isinstance(text, str))
            pending += node.values()
        elif isinstance(node, list):
            pending += node


def _listed(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Turns a panic of llguidance, which is no `Exception`, into a `GuideError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _error_of(str(error)) from error


def _error_of(message: str) -> GuideError:
    """Returns the error for a message of llguidance, without its listing of the grammar."""
    lines = [line for line in message.splitlines() if not re.match(r"\s*(\d+ \||\^)", line)]
    text = " ".join(" ".join(lines).split())
    text = re.sub(
        r"^at \d+\(\d+\): |failed to compile JSON schema: | ?<(state|non-verbose).*", "", text
    )
    if text.startswith("NoExtension"):
        text = "no text of the model's vocabulary satisfies it"
    shown = text if len(text) <= 300 else f"{text[:297]}..."
    return GuideError(f"the guide cannot be honoured: {shown}; change it")
