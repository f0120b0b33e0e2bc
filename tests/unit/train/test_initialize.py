"""`easyllm.initialize`: backward and step equal a plain loop."""

import pytest
import torch

import easyllm
from easyllm.core.errors import ConfigError
from easyllm.nn.context import ForwardContext
from tiny_models import build_tiny

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
}


def loss_of(model, ids):
    hidden = model(ids, ForwardContext.packed([len(ids)]))
    return torch.nn.functional.cross_entropy(model.head(hidden)[:-1], ids[1:])


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 320, (n,), generator=generator) for n in (9, 5, 12, 7)]


def test_the_engine_equals_a_plain_loop():
    engine = easyllm.initialize(build_tiny().requires_grad_(True), CONFIG)
    plain = build_tiny().requires_grad_(True)
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
    )
    for number, ids in enumerate(batches()):
        engine.backward(loss_of(engine.model, ids))
        norm = engine.step()
        (loss_of(plain, ids) / 2).backward()
        if number % 2 == 0:
            assert norm is None
            continue
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        assert norm == pytest.approx(float(expected), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    assert engine.global_steps == 2
    for mine, theirs in zip(engine.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_losses_can_be_weighted_by_tokens():
    config = CONFIG | {"gradient_clipping": 0, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine = easyllm.initialize(build_tiny().requires_grad_(True), config)
    plain = build_tiny().requires_grad_(True)
    pair = batches()[:2]
    for ids in pair:
        engine.backward(loss_of(engine.model, ids), num_tokens=len(ids) - 1)
        engine.step()
        (loss_of(plain, ids) * (len(ids) - 1) / sum(len(i) - 1 for i in pair)).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for mine, theirs in zip(engine.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="requires a gradient"):
        easyllm.initialize(build_tiny(), CONFIG)
    values = CONFIG | {"scheduler": {"type": "WarmupLR", "params": {}}}
    with pytest.raises(ConfigError, match="takes no scheduler"):
        easyllm.initialize(build_tiny().requires_grad_(True), values)
