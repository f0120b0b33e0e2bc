"""Memory of a training step: planned from the configuration, compared with actual tensors."""

import pytest
import torch

from easyllm.adapters import PTuningConfig, adapter_parameters, attach
from easyllm.adapters.lora import LoRAConfig
from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.examples.sample import Sample
from easyllm.models.families import family_of
from easyllm.nn.cost import Work, saved_bytes
from easyllm.nn.decoder import Decoder
from easyllm.nn.recompute import recompute_activations
from easyllm.plan.memory import estimate_training, memory_reductions
from easyllm.plan.trace import trace_model
from easyllm.quant import quantize_weights
from easyllm.train.objectives import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig, MuonConfig, SGDConfig
from easyllm.train.paged_adamw import CHUNK
from prompt_adapters import CONFIGS
from tiny_hf import DEEPSEEK
from tiny_models import tiny_config

LENGTHS = (40, 23)
HEADS = DEEPSEEK | {"qk_nope_head_dim": 24}  # 32 with the rotated part: a width of the kernels
FAMILIES = {
    "llama": {},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "deepseek_v2": HEADS,
    "deepseek_v2, queries in one": {"model_type": "deepseek_v2"} | HEADS | {"q_lora_rank": None},
    "deepseek_v3": HEADS | {"n_group": 3, "topk_group": 2},
}
MODES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def config_of(name, **changes):
    values = {"model_type": name} | FAMILIES[name] | changes
    return family_of(values["model_type"]).read_config(tiny_config(**values))


def model_of(config, dtype=torch.float32):
    model = Decoder(config)
    model.reset_parameters(std=0.1, generator=torch.Generator().manual_seed(0))
    return model.to(dtype).requires_grad_(True).train()


def batch_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    parts = [tuple(torch.randint(3, 300, (n,), generator=generator).tolist()) for n in lengths]
    return pack([Sample(part, part) for part in parts])


def kept_by_autograd(model, batch):
    """Returns the bytes of distinct tensors saved for the backward pass, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def take(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # retained, so that no address is reused
        return tensor

    routing = [] if model.config.has_experts else None
    with torch.autograd.graph.saved_tensors_hooks(take, lambda tensor: tensor):
        model(batch.token_ids, batch.context(routing=routing))
    return sum(size for size, _ in storages.values())


def kept_by_plan(config, dtype, adapter=None):
    work = Work(
        lengths=LENGTHS,
        labelled=sum(LENGTHS),
        itemsize=dtype.itemsize,
        trains_all=adapter is None,
        input_grad=adapter is None,
    )
    trace = trace_model(config, work, adapter)
    return trace.shared_bytes + sum(saved_bytes(layer.events) for layer in trace.layers)


@MODES
@pytest.mark.parametrize("name", FAMILIES)
def test_planned_activations_equal_those_saved_by_autograd(name, dtype):
    config = config_of(name)
    assert kept_by_plan(config, dtype) == kept_by_autograd(model_of(config, dtype), batch_of())


@MODES
def test_planned_activations_with_adapters_equal_those_saved_by_autograd(dtype):
    config, lora = config_of("llama"), LoRAConfig(rank=4)
    model = model_of(config, dtype)
    attach(model, lora, seed=0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
    assert kept_by_plan(config, dtype, lora) == kept_by_autograd(model, batch_of())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_gives_the_same_gradients_and_saves_less(mode):
    config = config_of("llama", num_hidden_layers=4)
    plain, again = model_of(config), recompute_activations(model_of(config), mode)
    batch = batch_of()
    for model in (plain, again):
        LanguageModel().loss(model, batch).sum.backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    kept = kept_by_autograd(again, batch)
    assert kept < kept_by_autograd(plain, batch)
    setup = {"micro_batch_tokens": 63, "row_tokens": 40, "dtype": torch.float32}
    plan = estimate_training(config, recompute=mode, **setup)
    assert plan.activations < estimate_training(config, **setup).activations


@pytest.mark.parametrize(
    ("optimizer", "setup"),
    [
        (AdamWConfig(), {}),
        (AdamWConfig(state="int8"), {"int8_state": True}),
        (SGDConfig(momentum=0.9), {"optimizer": "sgd", "momentum": True}),
        (SGDConfig(), {"optimizer": "sgd"}),
        (MuonConfig(), {"optimizer": "muon"}),
    ],
    ids=["adamw", "adamw int8", "sgd with momentum", "sgd", "muon"],
)
def test_the_optimizer_state_has_the_planned_size(optimizer, setup):
    config = config_of("llama", hidden_size=64, intermediate_size=160)
    model = model_of(config)
    held = MasterOptimizer(dict(model.named_parameters()), optimizer)
    LanguageModel().loss(model, batch_of()).sum.backward()
    held.step(1.0)
    cached_bytes = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in held.tensors().items()
        if not name.startswith("master.") and tensor.numel() > 1  # a step counter does not count
    )
    plan = estimate_training(config, micro_batch_tokens=63, dtype=torch.float32, **setup)
    assert cached_bytes == plan.optimizer


@MODES
@pytest.mark.parametrize("scheme", ["nf4", "nf4-single", "int4"])
def test_the_weights_of_a_quantized_base_have_the_planned_size(scheme, dtype):
    config, lora = config_of("untied"), LoRAConfig(rank=4)
    model = quantize_weights(model_of(config, dtype).requires_grad_(False), scheme)
    adapters = attach(model, lora, seed=0)
    of_adapter = {id(p) for p in adapters.trained_parameters(model).values()}
    tensors = [*model.buffers(), *(p for p in model.parameters() if id(p) not in of_adapter)]
    tables = {t.data_ptr(): t.nbytes for t in tensors if t.numel()}
    trained = adapters.trained_parameters(model).values()
    plan = estimate_training(
        config, micro_batch_tokens=63, dtype=dtype, adapter=lora, scheme=scheme
    )
    assert plan.weights == sum(tables.values()) + sum(4 * p.numel() for p in trained)


@MODES
def test_planned_activations_on_a_quantized_base_equal_those_saved_by_autograd(dtype):
    config, lora = config_of("llama"), LoRAConfig(rank=4)
    model = quantize_weights(model_of(config, dtype).requires_grad_(False), "nf4")
    attach(model, lora, seed=0)
    assert kept_by_plan(config, dtype, lora) == kept_by_autograd(model, batch_of())


def test_paged_moments_are_planned_in_a_file():
    config = config_of("llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=4)
    setup = {"micro_batch_tokens": 64, "dtype": torch.float32}
    plain = estimate_training(config, **setup)
    paged = estimate_training(config, paged=True, **setup)
    assert paged.optimizer == 2 * CHUNK * 4
    assert paged.optimizer + paged.paged == plain.optimizer
    assert plain.peaks["update"] - paged.peaks["update"] == paged.paged
    muon = estimate_training(config, paged=True, optimizer="muon", **setup)
    whole = estimate_training(config, optimizer="muon", **setup)
    assert muon.optimizer + muon.paged == whole.optimizer


def test_mixed_precision_takes_the_published_sixteen_bytes_per_parameter():
    """Weights and gradients in 16 bits, fp32 master, momentum, variance.

    See ZeRO, arXiv 1910.02054, section 3.1; 20 bytes if the gradients are summed in fp32 (its
    blog's count).
    """
    config = config_of("llama")
    for micro_batches, each in ((1, 16), (3, 18)):
        plan = estimate_training(config, micro_batch_tokens=64, micro_batches=micro_batches)
        count = plan.weights // 6
        assert plan.weights + plan.gradients + plan.optimizer == each * count


def test_every_suggestion_to_fit_helps_and_says_whether_it_is_enough():
    config = config_of("llama")
    setup = {"micro_batch_tokens": 256, "row_tokens": 64}
    whole = estimate_training(config, **setup).total
    ways = memory_reductions(config, whole - 1, **setup)
    assert [way.what for way in ways][:1] == ["micro_batch_tokens=64"]
    assert all(way.total < whole and way.fits for way in ways)
    assert not any(way.fits for way in memory_reductions(config, 10, **setup))


def test_a_row_longer_than_the_context_is_refused():
    with pytest.raises(ConfigError, match="512 tokens are longer than the model's context of 256"):
        estimate_training(config_of("llama"), micro_batch_tokens=512)


@MODES
@pytest.mark.parametrize("name", ["prompt", "ptuning mlp", "prefix", "prefix mlp"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma"])
def test_planned_activations_with_virtual_tokens_equal_those_saved_by_autograd(family, name, dtype):
    config, adapter = config_of(family), CONFIGS[name]
    model = model_of(config, dtype)
    attach(model, adapter)
    assert kept_by_plan(config, dtype, adapter) == kept_by_autograd(model, batch_of())


def test_the_planned_workspace_of_an_lstm_is_near_that_of_pytorch():
    config = config_of("llama", hidden_size=64)
    adapter = PTuningConfig(num_virtual_tokens=20, encoder="lstm", encoder_hidden_size=512)
    model = model_of(config)
    attach(model, adapter)
    planned = kept_by_plan(config, torch.float32, adapter)
    assert planned == pytest.approx(kept_by_autograd(model, batch_of()), rel=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_plans_count_an_encoder_of_virtual_tokens(name):
    config, adapter = config_of("llama"), CONFIGS[name]
    model = model_of(config)
    trained = sum(p.numel() for p in attach(model, adapter).trained_parameters(model).values())
    options = {"micro_batch_tokens": 63, "row_tokens": 40, "dtype": torch.float32}
    plan = estimate_training(config, adapter=adapter, **options)
    assert plan.gradients == trained * 4
    assert plan.optimizer == trained * 8
    assert plan.weights == sum(p.numel() for p in model.parameters()) * 4
