"""Adapters that are added, removed or fail: no partial state, and no use of missing adapters."""

import pytest
import torch

from easyllm.adapters import LoRAConfig, adapter_of, attach, detach, merge, save_adapter
from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Request, SamplingParams
from easyllm.examples.sample import Sample
from easyllm.models import add_adapter, hf_module_name, to_classifier
from easyllm.models.families import family_of
from easyllm.nn.decoder import Decoder
from easyllm.nn.storage import PackedStorage
from easyllm.plan.compute import training_flops
from easyllm.plan.memory import estimate_training
from easyllm.train.objectives import LanguageModel, Reference
from tiny_models import build_tiny, tiny_config

IDS = torch.arange(5, 45)
PROMPT = [5, 6, 7, 8]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tiny_model_config(**changes):
    return family_of("llama").read_config(tiny_config(**changes))


def randomise(model, name="", seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _, adapter in adapter_of(model, name).linears.values():
        torch.nn.init.normal_(adapter.lora_B, std=0.3, generator=generator)


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "a", seed=1)


def saved(path, seed, **options):
    model = build_tiny(tie_word_embeddings=options.pop("tied", True))
    attach(model, LoRAConfig(rank=4, **options))
    randomise(model, seed=seed)
    return save_adapter(model, path, module_name=hf_module_name(model), base="tiny")


def llm_of(model, tokenizer, **options):
    return LLM(model=model, tokenizer=tokenizer, max_running=4, **options)


def tokens(llm, **options):
    return llm.generate([PROMPT], GREEDY, **options)[0].token_ids


@pytest.mark.parametrize("name", ["mine", ""])
def test_an_engine_sees_an_adapter_added_later(tiny_tokenizer, folder, name):
    model = build_tiny()
    llm = llm_of(model, tiny_tokenizer)
    plain = tokens(llm)
    add_adapter(model, folder, name=name)
    adapted = tokens(llm, adapter=name)
    assert adapted == tokens(llm_of(model, tiny_tokenizer), adapter=name) != plain
    detach(model)
    assert tokens(llm) == plain


def test_requests_of_a_removed_adapter_are_cancelled_and_others_continue(tiny_tokenizer, folder):
    model = build_tiny()
    add_adapter(model, folder, name="mine")
    llm = llm_of(model, tiny_tokenizer)
    plain = tokens(llm)
    one, other = (
        Request(prompt_ids=tuple(PROMPT), params=GREEDY, adapter=name) for name in ("mine", "")
    )
    llm.engine.add(one)
    llm.engine.add(other)
    llm.engine.step()
    detach(model, "mine")
    events = [event for _ in range(20) for event in llm.engine.step()]
    ends = {e.request_id: e.finish_reason for e in events if e.finish_reason}
    assert ends == {one.id: "cancelled", other.id: "length"}
    found = [e.token_id for e in events if e.request_id == other.id]
    assert found == plain[1:]
    assert llm.engine.pool.available == llm.engine.pool.num_pages


def test_unknown_adapter_names_are_refused_everywhere(tiny_tokenizer, folder):
    model = build_tiny()
    add_adapter(model, folder, name="mine")
    llm = llm_of(model, tiny_tokenizer)
    for call in (
        lambda: llm.generate([PROMPT], GREEDY, adapter="other"),
        lambda: llm.score(PROMPT, adapter="other"),
        lambda: model.logits(IDS, adapter="other"),
    ):
        with pytest.raises(ConfigError, match="other"):
            call()


def test_a_failed_attach_or_load_leaves_the_model_unchanged(tiny_tokenizer, tmp_path, folder):
    model = build_tiny()
    adapters = attach(model, LoRAConfig(rank=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match="already"):
        attach(model, LoRAConfig(rank=3))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert adapter_of(model) is adapters
    detach(model)

    classifier = to_classifier(build_tiny(), 3)
    attach(classifier, LoRAConfig(rank=2), also_trained=("score",))
    save_adapter(classifier, tmp_path / "c", module_name=hf_module_name(classifier), base="tiny")
    before = model.logits(IDS)
    with pytest.raises(ConfigError, match="load it alone"):
        add_adapter(model, tmp_path / "c", name="c")
    assert torch.equal(model.logits(IDS), before)
    add_adapter(model, tmp_path / "c")
    assert model.logits(IDS).shape[1] == 3
    assert torch.equal(detach(model).logits(IDS), before)

    with pytest.raises(ConfigError, match="load it alone"):
        llm_of(model, tiny_tokenizer, adapters={"a": folder, "c": tmp_path / "c"})
    assert not model.adapter_sets
    with pytest.raises(ConfigError, match="GB"):
        llm_of(model, tiny_tokenizer, adapters={"a": folder}, num_pages=10**9)
    assert not model.adapter_sets


def test_a_merge_that_fails_halfway_leaves_an_equivalent_model(monkeypatch):
    model = build_tiny()
    attach(model, LoRAConfig(rank=4))
    randomise(model)
    adapted = model.logits(IDS)
    last = list(adapter_of(model).linears.values())[-1][1]
    merged = type(last).merged

    def fails(self, weight, bias):
        if self is last:
            raise RuntimeError("no memory")
        return merged(self, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(type(last), "merged", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            merge(model)
    torch.testing.assert_close(model.logits(IDS), adapted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merge(model).logits(IDS), adapted, atol=1e-4, rtol=1e-4)


def test_merging_one_of_several_adapters_is_refused(tmp_path, folder):
    model = build_tiny()
    add_adapter(model, folder, name="a")
    add_adapter(model, saved(tmp_path / "b", seed=2), name="b")
    before = model.logits(IDS, adapter="b")
    with pytest.raises(ConfigError, match="would change the base of 'b'"):
        merge(model, "a")
    assert torch.equal(model.logits(IDS, adapter="b"), before)
    detach(model, "b")
    expected = model.logits(IDS, adapter="a")
    torch.testing.assert_close(merge(model, "a").logits(IDS), expected, atol=5e-4, rtol=1e-3)


def test_a_reference_uses_the_base_head_if_the_adapter_has_one():
    model = build_tiny(tie_word_embeddings=False)
    batch = pack([Sample.from_mask(IDS.tolist())])
    before = model.head(model(batch.token_ids, batch.context()))
    attach(model, LoRAConfig(rank=4, targets=("q_proj", "lm_head")))
    randomise(model)
    reference = Reference(model, without_adapter=True)
    assert torch.equal(reference.head(reference.hidden(batch)), before)


def test_all_linear_with_another_target_selects_both():
    model = build_tiny(tie_word_embeddings=False)
    names = attach(model, LoRAConfig(rank=2, targets=("all-linear", "lm_head"))).linears
    assert "lm_head" in names
    assert len(names) == 15
    with pytest.raises(ConfigError, match=r"rank_pattern 'qq_proj'.*did you mean 'q_proj'"):
        attach(build_tiny(), LoRAConfig(rank_pattern={"qq_proj": 3}))


class Rounded(PackedStorage):
    format = "test_rounded"

    def __init__(self, codes):
        super().__init__(tuple(codes.shape), torch.float32)
        self.register_buffer("codes", codes)

    def dense(self):
        return self.codes.float() / 16


def test_a_packed_weight_is_dequantized_again_in_the_backward_pass():
    storage = Rounded(torch.randint(-8, 8, (24, 16), dtype=torch.int8))
    x = torch.randn(5, 16, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = storage.linear(x, bias)
    assert torch.Size([24, 16]) not in kept
    y.square().sum().backward()
    other = x.detach().clone().requires_grad_(True)
    torch.nn.functional.linear(other, storage.dense(), bias.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(bias.grad, (2 * y).sum(0).detach())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_loss_equals_that_of_the_logits_of_an_adapted_head(dropout):
    model = Decoder(tiny_model_config(tie_word_embeddings=False))
    model.reset_parameters(std=0.1, generator=torch.Generator().manual_seed(0))
    attach(model, LoRAConfig(rank=4, alpha=64, dropout=dropout, targets=("lm_head",)))
    torch.nn.init.normal_(model.lm_head.adapter.lora_B)
    ids = torch.arange(3, 43)
    batch = pack([Sample(tuple(ids.tolist()), tuple(ids.roll(-1).tolist()))])
    model.train()
    torch.manual_seed(7)
    logits = model.head(model(batch.token_ids, batch.context()))
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    torch.manual_seed(7)
    found = LanguageModel().loss(model, batch).sum
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    adapter = model.lm_head.adapter
    wanted = torch.autograd.grad(expected, [adapter.lora_A, adapter.lora_B])
    got = torch.autograd.grad(found, [adapter.lora_A, adapter.lora_B])
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


def test_the_plan_counts_the_copy_of_a_head_changed_by_an_adapter():
    config = tiny_model_config(tie_word_embeddings=False, vocab_size=60_000)
    matrix = 60_000 * config.hidden_size
    setup = {"micro_batch_tokens": 64, "dtype": torch.bfloat16}
    without = estimate_training(config, adapter=LoRAConfig(targets=("q_proj",)), **setup)
    head = estimate_training(config, adapter=LoRAConfig(targets=("q_proj", "lm_head")), **setup)
    assert head.total - without.total > 8 * matrix
    flops = [
        training_flops(config, [64], adapter=LoRAConfig(targets=targets)).backward.head
        for targets in (("q_proj",), ("q_proj", "lm_head"))
    ]
    assert flops[1] == 2 * flops[0]
