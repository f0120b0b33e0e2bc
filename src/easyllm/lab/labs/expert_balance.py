"""Mixtures of experts: losses that keep the router balanced, and tokens beyond the capacity."""

from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.batches.packing import pack
from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import mean_loss, new_model, token_chains, train_small
from easyllm.models.families import family_of
from easyllm.nn.config import GLUConfig, ModelConfig, MoEConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.moe import MoE, Routing, load_balancing_loss, router_z_loss
from easyllm.train.objectives.router import router_losses

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
VOCABULARY = 32


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 6, "experts": 4}

    experts: PositiveInt = Field(default=8, ge=2, le=32, description="Experts of a layer.")
    coefficient: PositiveFloat = Field(
        default=0.02, le=1, description="Coefficient of the load-balancing loss."
    )
    steps: PositiveInt = Field(default=150, le=5000, description="Training steps.")


def run(parameters: Parameters) -> Result:
    """Trains the same mixture with and without the load-balancing loss."""
    generator = torch.Generator().manual_seed(parameters.seed)
    samples = token_chains(generator, 8 * parameters.steps + 32, vocab_size=VOCABULARY)
    held_out, samples = samples[:32], samples[32:]
    curves: dict[str, list[tuple[float, float]]] = {}
    loads, ends, losses = {}, {}, {}
    for name, coefficient in (("without", 0.0), ("with the loss", parameters.coefficient)):
        model = new_model(_config(parameters.experts, coefficient), parameters.seed)
        curve = curves.setdefault(name, [])

        watch = partial(_note, model, held_out, curve, parameters.steps)
        train_small(
            model,
            samples,
            steps=parameters.steps,
            batch_size=8,
            seed=parameters.seed,
            after_step=watch,
        )
        routing = _routing(model, held_out)
        loads[name] = (routing[-1].load() * parameters.experts).tolist()
        ends[name], losses[name] = curve[-1][1], mean_loss(model, held_out)
    switch, top2 = (float(load_balancing_loss(_uniform(k))) for k in (1, 2))
    dropped = _dropped(parameters)
    only_residual = _overflow_output(parameters)
    z = float(router_z_loss(_uniform(1)))
    return Result(
        numbers=[
            number(
                "switch",
                switch,
                "balancing loss of uniform routing, k = 1",
                "均匀路由时的均衡损失，k = 1",
            ),
            number(
                "top2",
                top2,
                "the same, k = 2, as Hugging Face counts",
                "同上，k = 2（Hugging Face 的算法）",
            ),
            number(
                "z",
                z,
                "router z-loss of equal logits, 4 experts",
                "logits 相等、4 个专家时的 router z-loss",
            ),
            number(
                "variation_without",
                ends["without"],
                "variation of the load without the loss",
                "无均衡损失时负载的变异系数",
            ),
            number(
                "variation_with",
                ends["with the loss"],
                "variation of the load with it",
                "有均衡损失时负载的变异系数",
            ),
            number(
                "loss_without", losses["without"], "held-out loss without", "无均衡损失时的留出损失"
            ),
            number(
                "loss_with",
                losses["with the loss"],
                "held-out loss with it",
                "有均衡损失时的留出损失",
            ),
            number(
                "dropped_125",
                dict(dropped)[1.25],
                "share of choices dropped at capacity 1.25",
                "容量系数 1.25 时被丢弃的比例",
            ),
            number(
                "overflow",
                only_residual,
                "largest output for a dropped token",
                "被丢弃词元的最大输出",
                2,
            ),
        ],
        figures=[
            Lines(
                title="Load of the experts in training",
                x="step",
                y="standard deviation / mean",
                lines=curves,
            ),
            Bars(
                title="Load at the end, last layer",
                x="expert",
                y="share, times the number of experts",
                groups=[str(i) for i in range(parameters.experts)],
                series=loads,
            ),
            Lines(
                title="Choices beyond the capacity",
                x="capacity factor",
                y="share dropped, new router",
                lines={"dropped": dropped},
                marks=True,
            ),
        ],
        claims=_claims(switch, top2, ends, only_residual, dict(dropped)),
    )


def _note(
    model: Decoder,
    samples: list[Sample],
    curve: list[tuple[float, float]],
    last: int,
    step: int,
    _: float,
) -> None:
    """Adds the variation of the load after the first, every tenth and the last step."""
    if step == 1 or step % 10 == 0 or step == last:
        metrics = router_losses(_routing(model, samples))[1]
        curve.append((float(step), metrics["router/load_variation"]))


def _claims(
    switch: float, top2: float, ends: dict[str, float], residual: float, dropped: dict[float, float]
) -> list[Any]:
    without, balanced = ends["without"], ends["with the loss"]
    return [
        claim(
            (
                "The article (huggingface.co/blog/zh/moe): an auxiliary loss makes experts receive "
                "about as many tokens each; it is least when routing is uniform.",
                "文章（huggingface.co/blog/zh/moe）：辅助损失使各专家得到数量相近的词元；路由均匀"
                "时最小。",
            ),
            (
                f"Uniform routing gives {switch:g} for k = 1 and {top2:g} for k = 2; the load's "
                f"variation is {balanced:.2f} with the loss and {without:.2f} without.",
                f"均匀路由时 k = 1 为 {switch:g}，k = 2 为 {top2:g}；负载的变异系数有该损失时为 "
                f"{balanced:.2f}，没有时为 {without:.2f}。",
            ),
            "reproduced" if balanced < without and switch == 1 and top2 == 2 else "not",
        ),
        claim(
            (
                "The article: an expert takes at most (tokens / experts) · capacity factor tokens; "
                "tokens beyond it pass through the residual connection alone.",
                "文章：每个专家最多处理（词元数 / 专家数）· 容量系数 个词元；超出的词元只经过残差"
                "连接。",
            ),
            (
                f"A token that is dropped gets {residual:g} from the experts; at 1.25 "
                f"{dropped[1.25]:.0%} of a new router's choices are dropped, at 2 "
                f"{dropped[2.0]:.0%}.",
                f"被丢弃的词元从专家得到 {residual:g}；新路由器在系数 1.25 时丢弃 "
                f"{dropped[1.25]:.0%}，"
                f"2 时丢弃 {dropped[2.0]:.0%}。",
            ),
            "reproduced" if residual == 0 else "not",
        ),
    ]


def _config(experts: int, coefficient: float) -> ModelConfig:
    return family_of("mixtral").read_config(
        {
            "model_type": "mixtral",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "num_local_experts": experts,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": coefficient,
            "tie_word_embeddings": True,
        }
    )


@torch.no_grad()
def _routing(model: Decoder, samples: list[Sample]) -> list[Routing]:
    found: list[Routing] = []
    batch = pack(samples)
    model.eval()
    model(batch.token_ids, batch.context(mask=model.config, routing=found))
    model.train()
    return found


def _uniform(k: int) -> Routing:
    """Returns the routing of 8 tokens that choose among 4 experts in turn."""
    chosen = torch.stack([(torch.arange(8) + i) % 4 for i in range(k)], dim=1)
    config = _layer(4, k, None).config
    return Routing(0, config, torch.zeros(8, 4), chosen, torch.zeros(8, k, dtype=torch.bool))


def _layer(experts: int, k: int, factor: float | None) -> MoE:
    config = MoEConfig(
        num_experts=experts,
        experts_per_token=k,
        expert=GLUConfig(intermediate_size=16),
        capacity_factor=factor,
    )
    layer = MoE(config, 16, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return layer.requires_grad_(False)


def _dropped(parameters: Parameters) -> list[tuple[float, float]]:
    """Returns (capacity factor, share of the choices that are dropped) for a new router."""
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(parameters.seed))
    found = []
    for factor in FACTORS:
        routing: list[Routing] = []
        _layer(parameters.experts, 1, factor).train()(
            x, ForwardContext.packed([512], routing=routing)
        )
        found.append((factor, float(routing[0].dropped.float().mean())))
    return found


def _overflow_output(parameters: Parameters) -> float:
    """Returns the largest magnitude that the experts add to tokens that they dropped."""
    x = torch.rand(12, 16, generator=torch.Generator().manual_seed(parameters.seed)) + 0.1
    layer = _layer(4, 1, 1.0).train()
    layer.router.weight.zero_()
    layer.router.weight[2] = 1.0  # all tokens prefer one expert
    routing: list[Routing] = []
    out = layer(x, ForwardContext.packed([12], routing=routing))
    return float(out[routing[0].dropped.squeeze(1)].abs().max())


LAB = Lab(
    name="expert-balance",
    rows=(27, 29),
    chapter="models",
    title=Text("Balanced experts, and their capacity", "专家的负载均衡与容量"),
    seconds=25,
    parameters=Parameters,
    run=run,
)
