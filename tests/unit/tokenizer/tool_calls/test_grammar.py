"""Grammars of answers with tool calls: what they accept, and what is written under them."""

import json
import random

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from easyllm.core.errors import DataError
from easyllm.tokenizer import ChatTemplate
from easyllm.tokenizer.reasoning import ReasoningFormat
from easyllm.tokenizer.tool_calls import (
    OneTool,
    OutputParser,
    PlainCalls,
    after_reasoning,
    joined,
    known_formats,
)
from tool_templates import SINGLE, TEMPLATES, called, calling, tool, turn

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "</arg_value>")
WORD = {"type": "string", "maxLength": 8}
TOOLS = [
    tool("look", place=WORD, days={"type": "integer", "minimum": 0, "maximum": 99}),
    tool("add", a={"type": "array", "items": {"type": "boolean"}, "maxItems": 3}),
    tool("now"),
]
NAMES = [*known_formats({}), "plain"]
END = "<|im_end|>"


class Vocabulary:
    """A tokenizer, for llguidance too; with the marks as added tokens or as ordinary text."""

    def __init__(self, backend, marks):
        self.backend = Backend.from_str(backend.to_str())
        self.backend.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
        added = self.backend.get_added_tokens_decoder().items()
        self.added = {token.content: i for i, token in added}
        self.end = self.backend.token_to_id(END)
        self.matchers = {}
        self.guide = LLTokenizer(self.backend.to_str(), eos_token=[self.end])
        ids = {mark: self.added[mark] for mark in marks if "think" in mark}
        self.reasoning = ReasoningFormat(open="<think>", close="</think>", ids=ids)

    def format(self, name):
        return PlainCalls(self.added) if name == "plain" else known_formats(self.added)[name]

    def matcher(self, grammar):
        """Returns a matcher that has read nothing; each grammar is compiled once."""
        if grammar not in self.matchers:
            self.matchers[grammar] = LLMatcher(self.guide, grammar)
        matcher = self.matchers[grammar].deep_copy()
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def accepts(self, grammar, text):
        """Whether a text is a whole answer under a grammar."""
        matcher = self.matcher(grammar)
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def sample(self, grammar, seed, likely=()):
        """Returns an answer of random tokens, with some likely texts and the end among them."""
        matcher, generator = self.matcher(grammar), random.Random(seed)
        texts = [self.backend.encode(text, add_special_tokens=False).ids for text in likely]
        ids, planned = [], []
        for _ in range(1000):
            words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.flatnonzero(np.unpackbits(words, bitorder="little"))
            if not planned and generator.random() < 0.5:
                planned = list(generator.choice([*texts, [self.end], [self.end]]))
            if not planned or planned[0] not in allowed:
                planned = [int(generator.choice(allowed))]
            token = planned.pop(0)
            if token == self.end:
                return self.backend.decode(ids, skip_special_tokens=False)
            assert matcher.consume_token(token), matcher.get_error()
            ids.append(token)
        raise AssertionError("the answer does not end")


@pytest.fixture(scope="module", params=["text", "tokens"])
def vocabulary(request, smollm2_tokenizer):
    return Vocabulary(smollm2_tokenizer.backend, MARKS if request.param == "tokens" else ())


def written(name, *calls):
    template = ChatTemplate(TEMPLATES["hermes" if name == "plain" else name])
    return turn(template, calling(*calls)).lstrip("\n")


ONE = [("look", {"place": 'a "b"', "days": 3})]
TWO = [("now", {}), ("add", {"a": [True, False]})]
WRONG_VALUE = [("look", {"place": "a", "days": 100})]
WRONG_TOOL = [("other", {})]
PROSE = "No {x} <function [y] call."


@pytest.mark.parametrize("name", NAMES)
def test_choices_are_honoured(vocabulary, name):
    format = vocabulary.format(name)

    def accepted(**options):
        grammar = format.grammar(TOOLS, **options)
        texts = [written(name, *calls) for calls in (ONE, TWO, WRONG_VALUE, WRONG_TOOL)]
        return [vocabulary.accepts(grammar, text) for text in (*texts, PROSE)]

    several = name not in SINGLE
    unknown = name in ("llama", "glm4")  # without a mark, the call of an unknown tool is text
    assert accepted(choice="auto") == [True, several, False, unknown, True]
    assert accepted(choice="auto", parallel=False) == [True, False, False, unknown, True]
    assert accepted(choice="required") == [True, several, False, False, False]
    assert accepted(choice="required", parallel=False) == [True, False, False, False, False]
    assert accepted(choice=OneTool("look")) == [True, False, False, False, False]
    assert accepted(choice="none") == [False, False, False, unknown, True]


@pytest.mark.parametrize("name", NAMES)
def test_text_may_precede_a_call_unless_it_is_required(vocabulary, name):
    if name in ("llama", "glm4"):
        return  # calls begin at the start of the answer
    format, text = vocabulary.format(name), f"Well.\n{written(name, *ONE)}"
    assert vocabulary.accepts(format.grammar(TOOLS), text)
    assert vocabulary.accepts(format.grammar(TOOLS, parallel=False), text)
    assert not vocabulary.accepts(format.grammar(TOOLS, choice="required"), text)
    assert not vocabulary.accepts(format.grammar(TOOLS, parallel=False), f"{text}\n{text}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("starts", [False, True])
def test_reasoning_precedes_calls_and_text(vocabulary, name, starts):
    format, call = vocabulary.format(name), written(name, *ONE)
    thoughts = f"{'' if starts else '<think>'}\nhm {{x}} now\n</think>\n\n"

    def accepts(text, **options):
        grammar = format.grammar(
            TOOLS, reasoning=vocabulary.reasoning, starts_in_reasoning=starts, **options
        )
        return vocabulary.accepts(grammar, text)

    for options in ({}, {"parallel": False}):
        assert accepts(thoughts + call, choice="auto", **options)
        assert accepts(f"{thoughts}Hi.", choice="auto", **options)
        assert accepts(thoughts + call, choice="required", **options)
    assert not accepts(f"{thoughts}Hi.", choice="required")
    assert not accepts(thoughts + call, choice="none")
    assert accepts(f"{thoughts}Hi.", choice="none")
    assert not accepts(thoughts + written(name, *WRONG_VALUE), choice="auto")
    assert not accepts(thoughts.removesuffix("</think>\n\n"), choice="required")
    assert accepts(call, choice="required") != starts
    assert accepts("Hi.", choice="auto") != starts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(2))
def test_random_answers_are_valid_calls(vocabulary, name, seed):
    format = vocabulary.format(name)
    for choice, parallel in (("required", True), ("required", False), (OneTool("look"), False)):
        grammar = format.grammar(
            TOOLS, choice=choice, parallel=parallel, reasoning=vocabulary.reasoning
        )
        text = vocabulary.sample(grammar, seed, likely=("</think>", "</tool_call>", '"', "]", "}"))
        calls = read(vocabulary, name, text)
        assert calls, text
        assert parallel or len(calls) == 1
        assert not isinstance(choice, OneTool) or calls[0][0] == "look"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["hermes", "llama", "mistral", "deepseek_v3", "qwen3_coder"])
def test_calls_in_random_free_answers_are_valid(vocabulary, name, seed):
    format = vocabulary.format(name)
    likely = (format.opening, '{"name": "', '"', "</think>", "\n", "]", "}")
    grammar = format.grammar(TOOLS, reasoning=vocabulary.reasoning)
    text = vocabulary.sample(grammar, seed, likely=[each for each in likely if each])
    read(vocabulary, name, text)


def read(vocabulary, name, text):
    """Returns the calls of an answer, after checking them by the tools' schemas."""
    parser = OutputParser(vocabulary.format(name), vocabulary.reasoning, tools=TOOLS)
    output = joined([*parser.push(text), *parser.finish()])
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
    calls = called(output)
    for called_name, arguments in calls:
        jsonschema.validate(arguments, schemas[called_name])
    marks = [mark for mark in vocabulary.format(name).triggers if mark in output.text]
    assert not marks, text
    return calls


NESTED = {
    "type": "object",
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    "properties": {
        "kind": {"enum": ["a", "b c"]},
        "when": {"type": "string", "format": "date"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]+$"},
        "near": {"$ref": "#/$defs/point"},
        "note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
        "size": {"type": "number", "exclusiveMinimum": 1},
    },
    "required": ["kind", "code", "near"],
    "additionalProperties": False,
}
GOOD = {"kind": "b c", "when": "2026-11-30", "code": "AB/1", "near": {"x": 1}, "note": "x"}


@pytest.mark.parametrize("name", ["hermes", "mistral_v11", "qwen3_coder", "glm45", "minimax_m2"])
def test_schemas_with_keywords_are_honoured(vocabulary, name):
    tools = [{"type": "function", "function": {"name": "f", "parameters": NESTED}}]
    grammar = vocabulary.format(name).grammar(tools, choice="required")

    def accepts(**changes):
        arguments = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
        return vocabulary.accepts(grammar, written(name, ("f", arguments)))

    assert accepts()
    assert accepts(when=None, note=None, size=1.5)
    assert not accepts(kind="c")
    assert not accepts(when="2026-13-01")
    assert not accepts(code="AB/")
    assert not accepts(code="xAB/1")
    assert not accepts(near={"x": "1"})
    assert not accepts(note="longer than 5")
    assert not accepts(size=1)
    assert not accepts(code=None)
    assert not accepts(other=1)


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "glm45"])
def test_undeclared_parameters_are_written_if_none_is_declared(vocabulary, name):
    tools = [{"type": "function", "function": {"name": "f"}}]
    grammar = vocabulary.format(name).grammar(tools, choice="required")
    assert vocabulary.accepts(grammar, written(name, ("f", {})))
    assert vocabulary.accepts(grammar, written(name, ("f", {"a": "x", "b c": 2})))


@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("anyOf", {"type": "object", "anyOf": [{"required": ["a"]}]}),
        ("type", {"type": "array"}),
        ("format", {"properties": {"a": {"type": "string", "format": "iri"}}}),
        ("format", {"properties": {"a": {"type": "string", "format": ["date"]}}}),
        ("not", {"properties": {"a": {"type": "string", "not": {"const": "x"}}}}),
        ("minLength", {"properties": {"a": {"type": "string", "minLength": [1]}}}),
        ("maxLength", {"properties": {"a": {"type": "string", "maxLength": -1}}}),
        ("pattern", {"properties": {"a": {"type": "string", "pattern": 3}}}),
        ("enum", {"properties": {"a": {"type": "string", "enum": "x"}}}),
        ("enum", {"properties": {"a": {"enum": ["</parameter>"]}}}),
        ("properties", {"properties": [1]}),
    ],
)
def test_keywords_that_plain_text_cannot_honour_are_refused(keyword, schema):
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(DataError, match=f"keyword '{keyword}'"):
        known_formats({})["qwen3_coder"].grammar(tools)


def test_alternatives_of_a_pattern_are_each_anchored(vocabulary):
    tools = [tool("f", a={"type": "string", "pattern": "^a|b/(c|[|)])$"})]
    grammar = vocabulary.format("qwen3_coder").grammar(tools, choice="required")
    values = {"ax": True, "xb/c": True, "b/|": True, "b/)": True, "xa": False, "b/cx": False}
    for value, is_valid in values.items():
        text = written("qwen3_coder", ("f", {"a": value}))
        assert vocabulary.accepts(grammar, text) == is_valid, value


@pytest.mark.parametrize(
    "pattern", ["(", "a)|(b", "/\nstart: TEXT\nX: /", "\\\nstart: TEXT", "a(?=b)"]
)
def test_a_pattern_does_not_leave_its_place(vocabulary, pattern):
    tools = [tool("f", a={"type": "string", "pattern": pattern})]
    grammar = vocabulary.format("qwen3_coder").grammar(tools, choice="required")
    matcher = LLMatcher(vocabulary.guide, grammar)
    assert matcher.is_error() or not vocabulary.accepts(grammar, "Hi.")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tools_are_quoted(vocabulary, name):
    tools = [tool(each) for each in ('a"b', "a\\b", "a/b", "a.b", "é", "<|x|>", "a|b")]
    for choice in ("required", "auto", "none"):
        vocabulary.matcher(vocabulary.format(name).grammar(tools, choice=choice))


def test_a_users_schema_cannot_set_options_of_llguidance(vocabulary):
    unique = {"type": "array", "uniqueItems": True}
    schema = {"type": "object", "x-guidance": {"lenient": True}, "properties": {"a": unique}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    grammar = vocabulary.format("hermes").grammar(tools)
    assert "uniqueItems" in LLMatcher(vocabulary.guide, grammar).get_error()


def test_no_tools_and_unknown_choices_are_refused():
    format = known_formats({})["hermes"]
    assert format.grammar([], choice="none") is None
    for choice in ("auto", "required", OneTool("x")):
        with pytest.raises(DataError, match="tool"):
            format.grammar([], choice=choice)
    with pytest.raises(DataError, match="'nope'"):
        format.grammar(TOOLS, choice=OneTool("nope"))


@pytest.mark.parametrize("starts", [False, True])
def test_any_grammar_may_follow_reasoning(vocabulary, starts):
    opened = "" if starts else "<think>"
    for answer in ({"lark_grammar": "start: NUMBER\nNUMBER: /[0-9]+/"}, {"json_schema": {}}):
        grammar = after_reasoning(answer, vocabulary.reasoning, starts)
        assert json.loads(grammar)["grammars"]
        assert vocabulary.accepts(grammar, f"{opened}hm\n</think>\n\n12")
        assert vocabulary.accepts(grammar, "12") != starts
        assert not vocabulary.accepts(grammar, f"{opened}hm")
        assert not vocabulary.accepts(grammar, f"{opened}hm</think>twelve")
    answer = {"lark_grammar": 'start: "12"'}  # whitespace would be part of what the client gets
    grammar = after_reasoning(answer, vocabulary.reasoning, starts)
    assert vocabulary.accepts(grammar, f"{opened}hm</think>\n\n12")
    assert not vocabulary.accepts(grammar, f"{opened}hm</think> 12")
    assert not vocabulary.accepts(grammar, "\n12")
