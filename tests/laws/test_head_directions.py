"""Heads that look forward, backward or both ways where attention is bidirectional."""

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.engine import Engine, Request, SamplingParams
from easyllm.engine.admission import check_generates
from easyllm.examples.sample import Sample
from easyllm.models import load_model, save_model
from easyllm.models.families import family_of
from easyllm.models.scratch import build_scratch
from easyllm.nn.config import AttentionConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import Work, saved_bytes
from easyllm.parallel.tensor import check_tensor_parallel
from easyllm.plan.trace import trace_model
from tiny_models import build_tiny

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
IDS = torch.randint(3, 320, (17,), generator=torch.Generator().manual_seed(0))


def with_directions(*directions, **changes):
    """Returns a tiny configuration, all of whose layers have these directions."""
    config = build_tiny().config
    layers = [
        layer.model_copy(
            update={
                "mixer": layer.mixer.model_copy(
                    update={"directions": directions, "causal": "prompt_mask" in changes}
                )
            }
        )
        for layer in config.layers
    ]
    assert config.layers[0].mixer.num_heads == len(directions)
    return config.changed(family="easyllm", layers=layers, **changes)


def hidden_of(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, ForwardContext.packed([len(ids)], **options))


@pytest.mark.parametrize(
    ("directions", "changed", "same"),
    [
        (["forward"] * 4, range(8, 17), range(8)),
        (["backward"] * 4, range(9), range(9, 17)),
        (["forward", "both", "forward", "forward"], range(17), []),
        (["forward", "backward", "forward", "backward"], range(17), []),
    ],
    ids=str,
)
def test_a_token_depends_on_those_in_the_directions_of_its_heads(directions, changed, same):
    """The ninth token is replaced, and each hidden state is the same or another."""
    model = build_scratch(with_directions(*directions), seed=0).eval()
    other = IDS.clone()
    other[8] = 2
    equal = (hidden_of(model) == hidden_of(model, other)).all(-1).tolist()
    assert [i for i in range(17) if not equal[i]] == list(changed)
    assert [i for i in range(17) if equal[i]] == list(same)


def test_reversed_texts_swap_forward_and_backward():
    """Without positions, a reversed text seen by reversed heads has the reversed states."""
    config = with_directions("forward", "backward", "both", "backward")
    swap = {"forward": "backward", "backward": "forward", "both": "both"}

    def plain(layer, *, reverse):
        mixer = layer.mixer.model_dump() | {"position": {"kind": "none"}}
        if reverse:
            mixer["directions"] = [swap[d] for d in mixer["directions"]]
        return layer.model_copy(update={"mixer": AttentionConfig.model_validate(mixer)})

    models = []
    for reverse in (False, True):
        layers = [plain(layer, reverse=reverse) for layer in config.layers]
        models.append(build_scratch(config.changed(layers=layers), seed=0).eval())
    ahead, back = hidden_of(models[0]), hidden_of(models[1], IDS.flip(0)).flip(0)
    torch.testing.assert_close(ahead, back, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", [0, 1, 9])
def test_tokens_after_a_prompt_are_causal(prefix):
    config = with_directions("forward", "backward", "both", "backward", prompt_mask="prefix")
    model = build_scratch(config, seed=0).eval()
    other = IDS.clone()
    other[-1] = 2
    a, b = (hidden_of(model, ids, prefix_lengths=(prefix,)) for ids in (IDS, other))
    assert torch.equal(a[:-1], b[:-1])
    if prefix <= 1:
        causal = build_scratch(build_tiny().config, seed=0).eval()
        torch.testing.assert_close(a, hidden_of(causal), atol=1e-6, rtol=0)


def test_decoding_through_the_cache_equals_the_training_forward(tiny_tokenizer):
    config = with_directions("forward", "backward", "both", "backward", prompt_mask="prefix")
    model = build_scratch(config, seed=3).eval()
    params = SamplingParams(temperature=1, seed=1, max_tokens=8, ignore_eos=True)
    request = Request(prompt_ids=tuple(IDS.tolist()), params=params)
    events = list(Engine(model, tiny_tokenizer).run([request]))
    ids = torch.tensor([*IDS, *(event.token_id for event in events)])
    plain = build_scratch(config.changed(layers=build_tiny().config.layers), seed=3).eval()
    rows = [m.head(hidden_of(m, ids, prefix_lengths=(17,))).log_softmax(-1) for m in (model, plain)]
    for row, event in enumerate(events, start=16):
        assert event.logprob == pytest.approx(rows[0][row, event.token_id].item(), abs=3e-5)
    assert not torch.allclose(*rows, atol=1e-2)


def test_packed_texts_equal_each_alone_with_the_gradient_of_the_sum():
    config = with_directions("forward", "backward", "both", "backward", prompt_mask="prefix")
    model = build_scratch(config, seed=1).requires_grad_(True).train()
    samples = [
        Sample.from_mask(IDS[a:b].tolist(), [False] * p + [True] * (b - a - p))
        for a, b, p in ((0, 9, 4), (9, 17, 6))
    ]
    grads = []
    for batches in ([pack(samples)], [pack([sample]) for sample in samples]):
        model.zero_grad()
        for batch in batches:
            model(batch.token_ids, batch.context(mask=config)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_directions_are_saved_or_refused(tmp_path):
    config = with_directions("forward", "backward", "both", "backward")
    model = build_scratch(config, seed=0)
    assert load_model(save_model(model, tmp_path / "own")).config == config
    model.config = config.changed(family="llama")
    with pytest.raises(CheckpointError, match="cannot represent this model"):
        save_model(model, tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


def test_what_cannot_honour_directions_refuses_them():
    config = with_directions("forward", "backward", "both", "backward")
    with pytest.raises(ConfigError, match="attends to later tokens, so it cannot generate"):
        check_generates(config)
    with pytest.raises(ConfigError, match="heads with directions of their own"):
        check_tensor_parallel(config, 2)


def test_planned_activations_of_a_bidirectional_model_equal_those_saved_by_autograd():
    config = with_directions("forward", "backward", "both", "backward")
    model = build_scratch(config, seed=0).requires_grad_(True).train()
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def take(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(take, lambda tensor: tensor):
        model(IDS, ForwardContext.packed([9, 8]))
    work = Work(lengths=(9, 8), labelled=17, itemsize=4, trains_all=True, input_grad=True)
    trace = trace_model(config, work, None)
    planned = trace.shared_bytes + sum(saved_bytes(layer.events) for layer in trace.layers)
    assert planned == sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"directions": ["forward"]}, "1 values for num_heads=4; give one per query head"),
        ({"directions": ["sideways"] * 4}, "directions"),
        ({"directions": ["both"] * 4, "logn_length": 8}, "remove directions or logn_length"),
        ({"directions": ["both"] * 4, "window": 8, "num_sinks": 1}, "or num_sinks"),
        ({"directions": ["both"] * 4, "position": {"kind": "rerope", "window": 4}}, "or rerope"),
    ],
    ids=str,
)
def test_invalid_directions_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        AttentionConfig.model_validate(HEADS | changes)


def test_directions_without_a_bidirectional_part_are_refused():
    with pytest.raises(ValueError, match="set prompt_mask to prefix, or causal to false"):
        with_directions(*["backward"] * 4, prompt_mask="causal")


def test_an_encoder_has_directions_and_its_decoder_none():
    sizes = {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 8, "num_heads": 2}
    config = family_of("t5").read_config(sizes | {"d_ff": 24, "num_layers": 1})

    def directed(layer):
        mixer = layer.mixer.model_copy(update={"directions": ("forward", "backward")})
        return layer.model_copy(update={"mixer": mixer}).model_dump()

    encoder = config.encoder.model_dump() | {"layers": [directed(config.encoder.layers[0])]}
    model = build_scratch(config.changed(family="easyllm", encoder=encoder), seed=0).eval()
    plain = build_scratch(config, seed=0).eval()
    ids = torch.arange(3, 20)
    rows = [hidden_of(m, ids, prefix_lengths=(9,)) for m in (model, plain)]
    assert not torch.allclose(*rows)
    with pytest.raises(ValueError, match="no effect there; set it in the encoder's layers"):
        config.changed(layers=[directed(config.layers[0])])
