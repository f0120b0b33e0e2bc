"""Mixtures of experts next to `transformers`' implementations of the same layer.

    python bench/moe_peer.py [--only mixtral qwen3-moe] [--dtypes bfloat16 float32]
        [--tokens 1 32 512] [--threads 2] [--turns 7] [--steps-of grouped_mm] [--record]

Needs `transformers` (extra `reference`). One layer with the sizes of Mixtral 8x7B and of
Qwen3-30B-A3B, whose weights both share. A forward pass without gradient, and a training step: a
forward and backward pass, gradients of weights and input, for the largest number of tokens. All are
timed in turns; `ratio` is the median time of the fastest of `eager`, `grouped_mm` and `batched_mm`
(where it fits into memory) divided by ours. A training step of `eager` with 128 experts takes
minutes, because the gradient of each expert has the size of all: it is left out unless named.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import machine
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from easyllm.models.families import family_of
from easyllm.nn.context import ForwardContext
from easyllm.nn.feed_forward import build_feed_forward
from easyllm.nn.moe import MoE

MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN3 = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
SHAPES = {
    "mixtral": ("mixtral", MIXTRAL, MixtralSparseMoeBlock),
    "qwen3-moe": ("qwen3_moe", QWEN3, Qwen3MoeSparseMoeBlock),
}
PEERS = ("eager", "grouped_mm", "batched_mm")
MAX_COPIED = 8
"""`batched_mm` copies the weights of each token's experts: left out above this number of tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps-of", nargs="+", choices=PEERS, default=["grouped_mm"])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [
        result
        for name in options.only
        for dtype in options.dtypes
        for result in measure(name, getattr(torch, dtype), options)
    ]
    row = machine.row("moe-against-transformers", results=results)
    machine.finish(row, "moe", record=options.record)


def measure(name: str, dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the times of one shape: a forward pass for each number of tokens, and a step."""
    ours, peers = build(name, dtype)
    check({"easyllm": Ours(ours), **fitting(peers, 64)}, torch.randn(64, ours.router.in_features))
    results = []
    for tokens in options.tokens:
        x = torch.randn(tokens, ours.router.in_features).to(dtype)
        blocks = {"easyllm": Ours(ours), **fitting(peers, tokens)}
        with torch.inference_mode():
            runs = {key: forward_of(block, x) for key, block in blocks.items()}
            times = in_turns(runs, options.turns)
        results.append(summary(times) | {"pass": "forward", "tokens": tokens})
    tokens = max(options.tokens)
    x = torch.randn(tokens, ours.router.in_features).to(dtype).requires_grad_()
    blocks = {"easyllm": Ours(ours), **{key: peers[key] for key in options.steps_of}}
    steps = {key: step_of(block, x) for key, block in blocks.items()}
    times = in_turns(steps, options.turns)
    results.append(summary(times) | {"pass": "step", "tokens": tokens})
    shape = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
    for result in results:
        print(shape | result, flush=True)
    return [shape | result for result in results]


class Ours(nn.Module):
    """Our layer, called like the others: [1, T, D] to [1, T, D]."""

    def __init__(self, block: MoE) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[0], ForwardContext.packed([x.shape[1]]))[None]


def build(name: str, dtype: torch.dtype) -> tuple[MoE, dict[str, nn.Module]]:
    """Returns our layer, and one of each implementation of `transformers`, on the same weights."""
    model_type, sizes, kind = SHAPES[name]
    sizes = sizes | {"num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 1}
    config = family_of(model_type).read_config({"model_type": model_type, "vocab_size": 8} | sizes)
    block = build_feed_forward(config.layers[0].feed_forward, config.hidden_size, 0)
    assert isinstance(block, MoE)
    generator = torch.Generator().manual_seed(0)
    peers: dict[str, nn.Module] = {}
    for peer in PEERS:
        hf = AutoConfig.for_model(model_type, vocab_size=8, **sizes)
        hf._experts_implementation = peer
        with torch.device("meta"):
            layer = kind(hf)
        if not peers:
            layer = layer.to_empty(device="cpu").to(dtype)
            for parameter in layer.parameters():
                chunk = torch.randn(1 << 20, generator=generator).mul_(0.02)
                flat = parameter.data.view(-1)
                for start in range(0, len(flat), len(chunk)):
                    part = flat[start : start + len(chunk)]
                    part.copy_(chunk[: len(part)].roll(start % 9973))
            nn.init.normal_(layer.gate.weight, std=0.02, generator=generator)
        else:
            layer.load_state_dict(peers["eager"].state_dict(), assign=True)
        peers[peer] = layer.train()
    share(block, peers["eager"])
    return block.train(), peers


def share(block: MoE, peer: nn.Module) -> None:
    """Makes the weights of our layer views of those of the other."""
    block.router.weight = nn.Parameter(peer.gate.weight.data)
    for number, expert in enumerate(block.experts):
        fused = peer.experts.gate_up_proj.data[number]
        expert.gate_proj.weight, expert.up_proj.weight = map(nn.Parameter, fused.chunk(2))
        expert.down_proj.weight = nn.Parameter(peer.experts.down_proj.data[number])


def fitting(peers: dict[str, nn.Module], tokens: int) -> dict[str, nn.Module]:
    return {k: v for k, v in peers.items() if k != "batched_mm" or tokens <= MAX_COPIED}


@torch.no_grad()
def check(blocks: dict[str, nn.Module], x: Tensor) -> None:
    """Stops if implementations disagree: at most on tokens whose last experts are nearly tied."""
    dtype = next(blocks["eager"].parameters()).dtype
    outs = {key: block(x.to(dtype)[None])[0].float() for key, block in blocks.items()}
    for key, out in outs.items():
        error = (out - outs["eager"]).norm(dim=-1) / outs["eager"].norm(dim=-1)
        assert error.median() < 0.02, (key, error.median())


def forward_of(block: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: block(x[None])


def step_of(block: nn.Module, x: Tensor) -> Callable[[], object]:
    def step() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x[None]).float().square().mean().backward()
        block.zero_grad(set_to_none=True)

    return step


def in_turns(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Times the functions alternately, so that changes of the machine's speed affect all."""
    times: dict[str, list[float]] = {key: [] for key in runs}
    for turn in range(turns + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[key].append(time.perf_counter() - start)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the median milliseconds of each, and the ratio of the best other to ours."""
    middle = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    best = min((key for key in middle if key != "easyllm"), key=lambda key: middle[key])
    return {
        "ms": {key: round(value, 2) for key, value in middle.items()},
        "best": best,
        "ratio": round(middle[best] / middle["easyllm"], 3),
    }


if __name__ == "__main__":
    main()
