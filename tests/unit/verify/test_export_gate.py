"""The figures of the gate: what it bounds, what it only reports, and which texts it reads."""

import math

import pytest
import torch

from easyllm.adapters import adapter_of, merge
from easyllm.core.errors import DataError
from easyllm.engine import LLM
from easyllm.quant import quantize_weights
from easyllm.tokenizer import SpecialTokens, Tokenizer
from easyllm.verify.export_gate import BOUNDS, GateError, Variant, direct, run_gate, served
from easyllm.verify.gate_text import PASSAGES, GateText, gate_text
from tiny_models import build_tiny
from trained_adapters import METHODS, attached

TEXT = GateText((tuple(range(5, 45)), (7, 8, 9)), "ids")
BOUND = BOUNDS[torch.float32]


def fixed(*logits):
    """Returns a variant's `open` whose logits are given."""
    return lambda: lambda _sequences: logits


def compared(expected, found, **options):
    text = GateText((tuple(range(len(expected))),), "ids")
    variant = Variant(name="other", open=fixed(found), bound=BOUND)
    return run_gate(Variant(name="one", open=fixed(expected)), [variant], text, **options)


def test_the_figures_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(70, 11, generator=generator) * 3
    other = one + 0.7 * torch.randn(70, 11, generator=generator)
    gate = compared(one, other)
    (row,) = gate.rows
    p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
    assert row.drift == pytest.approx(float((one - other).abs().max() / (one.max() - one.min())))
    assert row.kl_nats == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()))
    assert row.agreement == pytest.approx(float((one.argmax(1) == other.argmax(1)).float().mean()))
    assert 0.5 < row.agreement < 1
    assert not gate.passed
    assert "other differs from one by" in gate.complaint
    assert compared(one, other, max_drift=2 * row.drift).passed


def test_agreement_alone_never_fails():
    one = torch.zeros(5, 4)
    one[:, 0], one[:, 3] = 1e-6, 10.0
    one[:, 1] = 10.0 - 1e-6
    other = one.clone()
    other[:, 1] = 10.0 + 1e-6
    gate = compared(one, other)
    assert (gate.rows[0].agreement, gate.passed) == (0.0, True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 4])
def test_what_is_not_a_finite_number_fails(value, place):
    other = torch.randn(5, 4)
    one = other.clone()
    other[place, 2] = value
    gate = compared(one, other)
    assert not gate.passed
    assert gate.as_dict()["rows"][0]["drift"] is None
    assert gate.complaint


def test_logits_of_another_vocabulary_fail():
    assert not compared(torch.randn(5, 4), torch.randn(5, 6)).passed


def test_variants_are_opened_one_after_the_other_and_may_decline():
    opened, model = [], build_tiny()

    def opens(name, result):
        def open():
            opened.append(name)
            return result

        return open

    variants = [
        Variant(name="a", open=opens("a", "it has none"), bound=BOUND),
        Variant(name="b", open=opens("b", direct(model)), bound=BOUND),
    ]
    gate = run_gate(Variant(name="r", open=opens("r", direct(model))), variants, TEXT)
    assert opened == ["r", "a", "b"]
    assert gate.passed
    assert gate.notes == ["a: not measured, it has none"]
    assert (gate.rows[1].drift, gate.rows[1].agreement) == (0.0, 1.0)


def test_an_engine_is_measured_on_its_own_cache_and_batches(tiny_tokenizer, monkeypatch):
    model = build_tiny()
    llm = LLM(model=model, tokenizer=tiny_tokenizer, num_pages=32, max_step_tokens=64)
    found = served(llm)(TEXT.sequences)
    for ids, logits in zip(TEXT.sequences, found, strict=True):
        torch.testing.assert_close(logits, model.logits(list(ids)), atol=1e-4, rtol=1e-4)
    run = type(llm.engine.runner).run
    monkeypatch.setattr(type(llm.engine.runner), "run", lambda self, step: run(self, step) * 1.01)
    variant = Variant(name="served", open=lambda: served(llm), bound=BOUND)
    assert not run_gate(Variant(name="r", open=lambda: direct(model)), [variant], TEXT).passed


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.02), ("int4", 0.6)])
def test_what_requantizing_a_merged_weight_costs_is_measured(scheme, most):
    model = attached(quantize_weights(build_tiny(), scheme), METHODS["lora"])
    plain = quantize_weights(build_tiny(), scheme)
    adapter = next(iter(adapter_of(model).linears.values()))[1]
    variants = [
        Variant(name="base", open=lambda: direct(plain)),
        Variant(name="merged", open=lambda: direct(merge(model, requantize=True)), bound=1.0),
    ]
    gate = run_gate(Variant(name="attached", open=lambda: direct(model)), variants, TEXT)
    base, merged = gate.rows
    assert adapter is not model.layers[0].mixer.q_proj.adapter  # measured after the merge
    assert 0 < merged.kl_nats < most * base.kl_nats
    assert BOUND < merged.drift < base.drift


def test_a_rounding_that_costs_as_much_as_the_adapter_is_noted():
    one = torch.randn(9, 50)
    variants = [
        Variant(name="base", open=fixed(one + 0.01 * torch.randn(9, 50))),
        Variant(name="saved", open=fixed(one + 0.01 * torch.randn(9, 50)), bound=1.0),
    ]
    gate = run_gate(
        Variant(name="the adapter", open=fixed(one)), variants, GateText((tuple(range(9)),), "ids")
    )
    assert gate.passed
    assert "saved: rounding costs over half of what the adapter changes" in gate.notes[0]


def test_the_built_in_text_is_cut_to_the_context(tiny_tokenizer):
    text = gate_text(tiny_tokenizer, vocab_size=320, max_seq_len=100)
    assert text.source == "built-in text"
    assert [len(ids) for ids in text.sequences] == [99, *[64] * len(PASSAGES)]
    decoded = tiny_tokenizer.decode(list(text.sequences[2]))
    assert decoded.startswith("清晨的集市")
    huge = gate_text(tiny_tokenizer, vocab_size=2**20, max_seq_len=4096)
    assert huge.num_tokens == 256  # the logits of more would take too much memory


def test_a_file_is_read_and_a_wrong_one_refused(tiny_tokenizer, tmp_path):
    sizes = {"vocab_size": 320, "max_seq_len": 101}
    (tmp_path / "t.txt").write_text("hello world 你好 " * 2000)
    text = gate_text(tiny_tokenizer, path=tmp_path / "t.txt", **sizes)
    assert (text.source, text.num_tokens) == (str(tmp_path / "t.txt"), 2048)
    assert {len(ids) for ids in text.sequences[:-1]} == {100}
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    for name, message in (("empty", "is empty"), ("bytes", "cannot be read"), ("no", "No such")):
        with pytest.raises(DataError, match=message):
            gate_text(tiny_tokenizer, path=tmp_path / f"{name}.txt", **sizes)


def test_random_ids_are_used_if_the_tokenizer_cannot_read_the_text_and_it_is_said(tiny_tokenizer):
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    words = Backend(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    unknown = Tokenizer(words, SpecialTokens(unk="<unk>"))
    for tokenizer, reason in (
        (None, "the base has no tokenizer"),
        (unknown, "does not know over half of built-in text"),
    ):
        text = gate_text(tokenizer, vocab_size=320, max_seq_len=2048)
        assert text.source.startswith("random token ids (seed 0): ")
        assert reason in text.source
        assert text.num_tokens == 512
        assert len({*text.sequences[0]}) > 100
        assert text == gate_text(tokenizer, vocab_size=320, max_seq_len=2048)
    text = gate_text(tiny_tokenizer, vocab_size=100, max_seq_len=2048)
    assert "ids that the model lacks" in text.source
    assert max(map(max, text.sequences)) < 100


def test_the_error_has_exit_code_1():
    assert GateError("x", compared(torch.randn(2, 3), torch.randn(2, 3))).exit_code == 1
