"""Guides as token masks: ends, special tokens, vocabularies, grammars, caching, threads, limits."""

import threading

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from easyllm.engine.guide_spec import GuideError, GuideSpec
from easyllm.engine.guided import CACHE_SIZE, Guides
from easyllm.engine.masks import compute_together
from easyllm.tokenizer import SpecialTokens, Tokenizer
from guide_texts import GuideTexts, allowed
from tokenizer_training import sentencepiece_file

SPECIAL = (0, 1, 2)  # of the tiny tokenizer


@pytest.fixture(scope="module")
def guides(tiny_tokenizer):
    return Guides(tiny_tokenizer, vocab_size=320, eos_ids=(2,))


@pytest.fixture(scope="module")
def texts(guides, tiny_tokenizer):
    return GuideTexts(guides, tiny_tokenizer, 2)


def read(mask, tokenizer, text):
    """Reads the tokens of a text, checking that each is allowed; returns the mask."""
    for token in tokenizer.encode(text, special_tokens=False):
        assert token in allowed(mask)
        mask.advance(token)
    return mask


# ---- ends


def test_a_completed_guide_allows_only_eos_and_nothing_after_it(guides, tiny_tokenizer):
    mask = read(guides.compile(GuideSpec(choice=("the",))).start(), tiny_tokenizer, "the")
    assert allowed(mask) == {2}
    mask.advance(2)
    assert allowed(mask) == set()


def test_a_guide_that_may_continue_allows_eos_among_others(guides, tiny_tokenizer):
    mask = read(guides.compile(GuideSpec(regex="[a-z]+")).start(), tiny_tokenizer, "the")
    assert 2 in allowed(mask)
    assert len(allowed(mask)) > 20
    assert 2 not in allowed(guides.compile(GuideSpec(regex="[a-z]+")).start())


def test_every_eos_id_may_end_a_guide(tiny_tokenizer):
    guides = Guides(tiny_tokenizer, vocab_size=320, eos_ids=(2, 0))
    for eos in (0, 2):
        mask = read(guides.compile(GuideSpec(choice=("a",))).start(), tiny_tokenizer, "a")
        assert allowed(mask) == {0, 2}
        mask.advance(eos)
        assert allowed(mask) == set()


def test_special_tokens_are_never_part_of_a_text(guides):
    for spec in (GuideSpec(regex="(?:.|[^.])*"), GuideSpec(json_schema=True)):
        assert not allowed(guides.compile(spec).start()) & {0, 1}


def test_the_name_of_a_special_token_is_plain_text(texts, guides):
    assert texts.accepts("<|im_end|>", choice=("<|im_end|>",))
    assert not allowed(guides.compile(GuideSpec(choice=("<|im_end|>",))).start()) & set(SPECIAL)


def test_a_trusted_grammar_may_name_special_tokens(guides):
    mask = guides.compile_lark('start: <|im_start|> "a"').start()
    assert allowed(mask) == {1}
    mask.advance(1)
    assert 1 not in allowed(mask)


# ---- vocabularies


@pytest.mark.parametrize("size", [320, 321, 352, 400])
def test_ids_without_a_token_are_never_allowed(tiny_tokenizer, size):
    guides = Guides(tiny_tokenizer, vocab_size=size, eos_ids=(2,))
    for source in (
        guides.compile(GuideSpec(regex="(?:.|[^.])+")),
        guides.compile_lark("start: <[*]>"),
    ):
        found = allowed(source.start())
        assert max(found) < 320
        assert len(source.start().mask()) == -(-size // 32)


def test_a_model_without_eos_cannot_be_guided(tiny_tokenizer):
    with pytest.raises(GuideError, match="eos_token_id"):
        Guides(tiny_tokenizer, vocab_size=320, eos_ids=())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_spells_texts_with_and_without_byte_fallback(tmp_path, kind):
    _, data = sentencepiece_file(kind)
    (tmp_path / "a.model").write_bytes(data)
    tokenizer = Tokenizer.from_sentencepiece(tmp_path / "a.model")
    guides = Guides(tokenizer, vocab_size=tokenizer.vocab_size, eos_ids=(tokenizer.eos_id,))
    schema = {
        "type": "object",
        "properties": {"名": {"enum": ["the new 😀", "鰐"]}},
        "required": ["名"],
        "additionalProperties": False,
    }
    generator = torch.Generator().manual_seed(0)
    for source in (
        guides.compile(GuideSpec(json_schema=schema)),
        guides.compile(GuideSpec(choice=("low er", "我们"))),
    ):
        for _ in range(10):
            mask, ids = source.start(), []
            while tokenizer.eos_id not in (found := sorted(allowed(mask))):
                ids.append(found[int(torch.randint(len(found), (), generator=generator))])
                mask.advance(ids[-1])
            written = b"".join(tokenizer.token_bytes(i) for i in ids).decode()
            assert tokenizer.decode(ids) == written
            assert written in {
                *('{"名":"the new 😀"}', '{"名": "the new 😀"}', '{"名":"鰐"}', '{"名": "鰐"}'),
                *("low er", "我们"),
            }


def letters_tokenizer(letters, decoder):
    backend = Backend(models.BPE({c: i for i, c in enumerate(["</s>", *letters])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoder
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, SpecialTokens(eos="</s>"))


def test_a_character_without_a_token_is_refused_by_name():
    tokenizer = letters_tokenizer([*'▁abc{}[]:,"', "中"], decoders.Metaspace())
    guides = Guides(tokenizer, vocab_size=tokenizer.vocab_size, eos_ids=(0,))
    guides.compile(GuideSpec(choice=("中a",)))
    guides.compile(GuideSpec(json_schema={"enum": ["中", "国"]}))  # one of them can be written
    for spec in (
        GuideSpec(choice=("a", "国")),
        GuideSpec(json_schema={"const": "国"}),
        GuideSpec(json_schema={"type": "object", "required": ["国"]}),
    ):
        with pytest.raises(GuideError, match="no token for '国'"):
            guides.compile(spec)
    with pytest.raises(GuideError, match="no text of the model's vocabulary"):
        guides.compile(GuideSpec(regex="国+"))


def test_a_text_that_no_token_continues_is_an_error_not_an_end():
    """llguidance itself would allow EOS here."""
    tokenizer = letters_tokenizer([*"▁abc"], decoders.Metaspace())
    guides = Guides(tokenizer, vocab_size=tokenizer.vocab_size, eos_ids=(0,))
    mask = guides.compile(GuideSpec(regex="a[中国]")).start()
    mask.advance(tokenizer.id_of("a"))
    with pytest.raises(GuideError, match="vocabulary"):
        mask.mask()


def test_a_tokenizer_whose_tokens_depend_on_their_neighbours_is_refused():
    with pytest.raises(GuideError, match="WordPiece"):
        Guides(letters_tokenizer("ab", decoders.WordPiece()), vocab_size=3, eos_ids=(0,))


# ---- forms


def test_choices_are_exact(texts):
    choices = ("yes", "no", "no!", 'q"\\', "中文\n", "a\x7f\x00b", "yes")
    for text in choices:
        assert texts.accepts(text, choice=choices)
    for text in ("", "y", "yes!", "中文", "q"):
        assert not texts.accepts(text, choice=choices)


def test_any_json_object(texts):
    for text in ("{}", '{"a":{"b":[1,null,"中"]}}', '{"a": 1, "b": 2}'):
        assert texts.accepts(text, json_object=True)
    for text in ("[]", "1", "{", '{"a":1,}'):
        assert not texts.accepts(text, json_object=True)


LARK = 'start: "a" B ("," B)* // the end\nB: /[0-9]{1,2}/ # %llguidance\n'
GBNF = '# numbers\nroot ::= "a" num ("," num)*\nnum ::= [0-9] [0-9]?\n'


@pytest.mark.parametrize("grammar", [LARK, GBNF], ids=["lark", "gbnf"])
def test_a_grammar_is_lark_or_gbnf(texts, grammar):
    for text in ("a1", "a12,3", "a0,0,0"):
        assert texts.accepts(text, grammar=grammar)
    for text in ("a", "a123", "a1,", "b1"):
        assert not texts.accepts(text, grammar=grammar)


def test_a_schema_in_a_grammar_is_checked_and_rewritten(texts, guides):
    grammar = 'start: "x" value\nvalue: %json {"type": "string", "format": "date"} | "-"'
    assert texts.accepts('x"2024-02-29"', grammar=grammar)
    assert texts.accepts("x-", grammar=grammar)
    assert not texts.accepts('x"2023-02-29"', grammar=grammar)
    assert texts.reads(guides.compile_lark(grammar), 'x"2024-02-29"')
    assert not texts.reads(guides.compile_lark(grammar), 'x"2023-02-29"')
    for compile_it in (lambda g: guides.compile(GuideSpec(grammar=g)), guides.compile_lark):
        with pytest.raises(GuideError, match="uniqueItems"):
            compile_it('start: %json {"uniqueItems": true}')
    options = 'start: %json {"x-guidance": {"lenient": true, "whitespace_flexible": true}}'
    with pytest.raises(GuideError, match="x-guidance"):
        guides.compile(GuideSpec(grammar=options))
    assert not texts.reads(guides.compile_lark(options), "[ ]")


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        ('%llguidance {"no_forcing": true}\nstart: "a"', "%llguidance"),
        ('%lark { start: "a" }', "%lark"),
        ("start: <|im_end|>", r"<\|im_end\|>"),
        ("start: <[0-9]>", r"<\[0-9\]>"),
        ("start: @other", "@other"),
        ("start: x\nx[temperature=0.5]: /a/", "temperature"),
        ("start: x\nx[capture, max_tokens=5]: /a/", "max_tokens"),
        ('start: x "b"\nx[stop="b"]: /a*/', "stop"),
        ("start: %json {", "no valid JSON"),
        ("start: other", "unknown name"),
        ("begin: /a/", "start"),
        ("start: /(?=a)/", "look-around"),
        ('start: "a', "cannot be honoured"),
        ('root ::= "a', "GBNF grammar is invalid"),
        ("root ::= other", "cannot be honoured|GBNF"),
        ("", "."),
    ],
)
def test_what_a_users_grammar_may_not_contain_is_named(guides, grammar, named):
    with pytest.raises(ValueError, match=named):
        guides.compile(GuideSpec(grammar=grammar))


def test_strings_and_comments_of_a_grammar_may_contain_anything(texts):
    grammar = 'start: "%llguidance <a> @b" /[<]x[>]/ // <c> %lark\n# @d\n'
    assert texts.accepts("%llguidance <a> @b<x>", grammar=grammar)


# ---- states


def test_masks_have_separate_states(guides, tiny_tokenizer):
    source = guides.compile(GuideSpec(regex="ab"))
    one, other = source.start(), source.start()
    read(one, tiny_tokenizer, "a")
    assert allowed(one) != allowed(other)


def test_masks_computed_together_equal_those_computed_alone(guides, tiny_tokenizer):
    specs = [
        GuideSpec(regex="[a-z ]+"),
        GuideSpec(choice=("the", "fox")),
        GuideSpec(json_schema={}),
    ]
    pairs = [(guides.compile(s).start(), guides.compile(s).start()) for s in specs * 3]
    for together, alone in pairs[3:]:
        token = min(allowed(alone) - {2})
        together.advance(token)
        alone.advance(token)
    compute_together(together for together, _ in pairs)
    for together, alone in pairs:
        assert together.words is not None
        assert torch.equal(together.mask(), alone.mask())


def test_a_single_token_is_allowed_if_the_mask_allows_it(tiny_tokenizer):
    guides = Guides(tiny_tokenizer, vocab_size=352, eos_ids=(2, 0))
    specs = (
        GuideSpec(regex="[a-z ]{1,9}"),
        GuideSpec(choice=("the", "fo")),
        GuideSpec(json_schema={}),
    )
    generator = torch.Generator().manual_seed(0)
    for source in (*map(guides.compile, specs), guides.compile_lark("start: <[1]> /a+/")):
        mask = source.start()
        for _ in range(20):
            found = sorted(allowed(mask))
            assert [i for i in range(352) if mask.allows(i)] == found
            if not found:
                break
            mask.advance(found[int(torch.randint(len(found), (), generator=generator))])


def test_a_token_that_is_not_allowed_is_an_error(guides):
    mask = guides.compile(GuideSpec(choice=("a",))).start()
    with pytest.raises(GuideError):
        mask.advance(1)
    with pytest.raises(GuideError):
        mask.mask()


# ---- cache, threads and limits


def test_compiled_guides_are_kept_and_the_oldest_dropped(tiny_tokenizer):
    guides = Guides(tiny_tokenizer, vocab_size=320, eos_ids=(2,))
    first = guides.compile(GuideSpec(regex="a"))
    assert guides.compile(GuideSpec(regex="a")) is first
    for i in range(CACHE_SIZE + 1):
        guides.compile(GuideSpec(choice=(f"x{i}",)))
        if i == 0:
            assert guides.compile(GuideSpec(regex="a")) is first
    assert guides.compile(GuideSpec(regex="a")) is not first


def test_an_error_is_not_kept(guides):
    for _ in range(2):
        with pytest.raises(GuideError):
            guides.compile(GuideSpec(regex="(?=a)"))


def test_threads_compile_and_read_at_once(guides, tiny_tokenizer):
    errors = []

    def work(number):
        try:
            for i in range(20):
                schema = {"type": "string", "maxLength": 5 + (number + i) % 7}
                mask = guides.compile(GuideSpec(json_schema=schema)).start()
                read(mask, tiny_tokenizer, '"the')
                mask.mask()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
