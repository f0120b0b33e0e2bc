"""Experts copied from a dense model: the same function at first, divided work after training."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Bars, Grid, Lab, LabConfig, Result, Text, claim, number
from easyllm.lab.small_models import mean_loss, new_model, small_config, token_chains, train_small
from easyllm.models.experts import merge_experts, upcycle
from easyllm.probe.experts import probe_experts

SOURCES, VOCABULARY = 2, 32


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"base_steps": 4, "steps": 4}

    experts: PositiveInt = Field(default=4, ge=3, le=16, description="Experts of a layer.")
    noise: float = Field(
        default=0.3, ge=0, le=2, description="Noise on the copies, relative to the weights."
    )
    base_steps: PositiveInt = Field(default=100, le=5000, description="Steps of the dense model.")
    steps: PositiveInt = Field(default=120, le=5000, description="Steps of the mixture.")


def run(parameters: Parameters) -> Result:
    """Trains a dense model, makes experts of it, trains those, and removes one after another."""
    generator = torch.Generator().manual_seed(parameters.seed)
    samples, held_out = _two_sources(generator, 8 * max(parameters.base_steps, parameters.steps))
    dense = new_model(small_config(vocab_size=SOURCES * VOCABULARY, width=32), parameters.seed)
    train_small(dense, samples, steps=parameters.base_steps, batch_size=8, seed=parameters.seed)
    dense.eval()
    ids = torch.tensor(held_out[0].token_ids)
    before, dense_loss = dense.logits(ids).detach(), mean_loss(dense, held_out)
    upcycle(dense, parameters.experts, noise=0.0, seed=parameters.seed).eval()
    copied = float((dense.logits(ids) - before).detach().abs().max())
    moe = merge_experts(dense, 1)
    upcycle(moe, parameters.experts, noise=parameters.noise, seed=parameters.seed)
    noisy_loss = mean_loss(moe, held_out)
    moe.requires_grad_(True)
    train_small(moe, samples, steps=parameters.steps, batch_size=8, seed=parameters.seed)
    trained_loss = mean_loss(moe, held_out)
    moe.requires_grad_(False).eval()
    reports = probe_experts(moe, [s.token_ids for s in held_out])
    losses = [report.loss_nats or [] for report in reports]
    flat = [loss for layer in losses for loss in layer]
    by_source = [
        probe_experts(moe, [s.token_ids for s in held_out[i::SOURCES]], ablate=False)[-1].load
        for i in range(SOURCES)
    ]
    names = [f"expert {i}" for i in range(parameters.experts)]
    return Result(
        numbers=[
            number(
                "copied",
                copied,
                "change of the logits by exact copies, top 2",
                "完全复制（前 2）引起的 logits 变化",
                2,
            ),
            number("dense_loss", dense_loss, "loss of the dense model", "稠密模型的损失"),
            number("noisy_loss", noisy_loss, "loss with noisy copies", "加噪复制后的损失"),
            number("trained_loss", trained_loss, "loss after training", "训练后的损失"),
            number(
                "least",
                min(flat),
                "least loss by removing an expert, nats",
                "去掉一个专家最小的损失增量",
            ),
            number(
                "most",
                max(flat),
                "largest loss by removing an expert, nats",
                "去掉一个专家最大的损失增量",
            ),
        ],
        figures=[
            Bars(
                title="What is lost without an expert",
                x="expert",
                y="loss, nats per token",
                groups=names,
                series={f"layer {r.layer}": v for r, v in zip(reports, losses, strict=True)},
            ),
            Grid(
                title=f"Load in layer {reports[-1].layer}, by source of the text",
                x="expert",
                y="source",
                values=by_source,
                x_labels=names,
                y_labels=[f"source {i}" for i in range(SOURCES)],
            ),
        ],
        claims=[
            claim(
                (
                    "If all experts are copies and the weights of a token's experts sum to 1, the "
                    "mixture computes what the dense model did.",
                    "若所有专家都是副本且每个词元的专家权重之和为 1，混合模型的计算与稠密模型相"
                    "同。",
                ),
                (
                    f"Logits differ by {copied:.0e} with {parameters.experts} copies, two a token.",
                    f"{parameters.experts} 个副本、每个词元用两个时，logits 相差 {copied:.0e}。",
                ),
                "reproduced" if copied < 1e-5 else "not",
            ),
            claim(
                (
                    "The article (zhihu 674751021) removes experts of Mixtral one by one; they are "
                    "not equally important.",
                    "文章（知乎 674751021）逐个去掉 Mixtral 的专家；它们的重要性并不相同。",
                ),
                (
                    f"Without one expert the loss grows by {min(flat):.3f} to {max(flat):.3f} "
                    f"nats.",
                    f"去掉一个专家后损失增加 {min(flat):.3f} 到 {max(flat):.3f} nats。",
                ),
                "direction",
                (
                    "A small model of two layers; the article is known to us from notes only.",
                    "这里是两层的小模型；该文章我们只从笔记得知。",
                ),
            ),
        ],
    )


def _two_sources(generator: torch.Generator, count: int) -> tuple[list[Sample], list[Sample]]:
    """Returns training and held-out texts of two sources in turn, with separate vocabularies."""
    chains = [token_chains(generator, count // SOURCES + 16) for _ in range(SOURCES)]
    mixed = [
        Sample.from_mask([i + VOCABULARY * source for i in sample.token_ids])
        for pair in zip(*chains, strict=True)
        for source, sample in enumerate(pair)
    ]
    return mixed[32:], mixed[:32]


LAB = Lab(
    name="upcycling",
    rows=(26,),
    chapter="models",
    title=Text("Experts made of a dense model", "由稠密模型得到专家"),
    seconds=15,
    parameters=Parameters,
    run=run,
)
