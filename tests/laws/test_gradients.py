"""Law 4: k micro-batches = one large batch, for any lengths and masks."""

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.examples.sample import Sample
from easyllm.train.config import AdamWConfig
from easyllm.train.loop import PrecisionPolicy, accumulate
from easyllm.train.objectives import LanguageModel
from easyllm.train.optim import MasterOptimizer
from tiny_models import build_tiny


def random_samples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for n in lengths:
        ids = torch.randint(3, 320, (n + 1,), generator=generator).tolist()
        mask = (torch.rand(n + 1, generator=generator) < 0.4).tolist()
        mask[-1] = True
        samples.append(Sample.from_mask(ids, mask))
    return samples


def gradients(groups):
    model = build_tiny(seed=1).requires_grad_(True)
    loss, _ = accumulate(model, LanguageModel(), [pack(group) for group in groups])
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("split", [[1, 3], [2, 2], [1, 1, 1, 1], [3, 1]])
def test_gradient_accumulation_over_unequal_micro_batches_equals_one_batch(split):
    samples = random_samples([3, 50, 8, 21])
    whole_loss, whole = gradients([samples])
    groups, at = [], 0
    for size in split:
        groups.append(samples[at : at + size])
        at += size
    loss, parts = gradients(groups)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_mean_of_micro_batch_means_differs():
    """Negative control: dividing each micro-batch by its own token count violates the law."""
    samples = random_samples([3, 50, 8, 21])
    _, whole = gradients([samples])
    model = build_tiny(seed=1).requires_grad_(True)
    for group in (samples[:1], samples[1:]):
        out = LanguageModel().loss(model, pack(group))
        (out.sum / out.num_tokens / 2).backward()
    name = "layers.0.mixer.q_proj.weight"
    assert not torch.allclose(model.get_parameter(name).grad, whole[name], rtol=0.05)


def test_gradient_equals_transformers(tiny_folder):
    """The loss and its gradient equal those of `transformers` on one sequence."""
    from transformers import AutoModelForCausalLM

    (sample,) = random_samples([40])
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.tensor([sample.token_ids])
    labels = torch.tensor(sample.labels)
    logits = reference(ids).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    expected.backward()
    model = build_tiny(seed=0).requires_grad_(True)
    loss, _ = accumulate(model, LanguageModel(), [pack([sample])])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    theirs = reference.model.layers[1].mlp.down_proj.weight.grad
    ours = model.get_parameter("layers.1.feed_forward.down_proj.weight").grad
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_bf16_parameters_lose_nothing_over_many_micro_batches():
    """Gradients of bf16 parameters accumulate in fp32: 64 equal micro-batches = 64 times one."""
    samples = random_samples([12])

    def master_grad(times):
        model = build_tiny(seed=1).to(torch.bfloat16).requires_grad_(True)
        optimizer = MasterOptimizer(dict(model.named_parameters()), AdamWConfig())
        for _ in range(times):
            LanguageModel().loss(model, pack(samples)).sum.backward()
        return optimizer.gradients()

    once, many = master_grad(1), master_grad(64)
    for name, grad in once.items():
        torch.testing.assert_close(
            many[name], grad * 64, rtol=1e-5, atol=1e-5 * grad.abs().max().item()
        )


def test_adamw_step_equals_torch_on_fp32():
    model, twin = (build_tiny(seed=2).requires_grad_(True) for _ in range(2))
    config = AdamWConfig(learning_rate=1e-2, weight_decay=0.1)
    ours = MasterOptimizer(dict(model.named_parameters()), config)
    decay = [p for p in twin.parameters() if p.ndim >= 2]
    rest = [p for p in twin.parameters() if p.ndim < 2]
    theirs = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2,
        betas=config.betas,
        foreach=False,
    )
    batch = pack(random_samples([20, 9]))
    for _ in range(3):
        for m in (model, twin):
            accumulate(m, LanguageModel(), [batch])
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        theirs.step()
        theirs.zero_grad()
        mine = ours.grad_norm()
        assert mine == pytest.approx(norm.item(), rel=1e-5)
        ours.clip(mine, 0.5)
        ours.step(1.0)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_padding_tokens_of_a_micro_batch_have_no_effect():
    samples = random_samples([3, 50, 8, 21])
    whole_loss, whole = gradients([samples])
    model = build_tiny(seed=1).requires_grad_(True)
    loss, _ = accumulate(
        model, LanguageModel(), [pack(samples)], PrecisionPolicy(token_multiple=64)
    )
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4, msg=name)
