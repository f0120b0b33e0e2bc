"""Pre-norm trains without a warm-up where post-norm stalls; one JSON row and a plot.

    python bench/norm_placement.py [--layers 16] [--steps 300] [--record]

Reproduces Xiong et al. 2020 (arXiv 2002.04745): the same small byte-level model with its norms
before the blocks or after the residual sum; AdamW at 1e-3 from the first step, Xavier
initialisation. Also measures the first gradient's norm in the first and last layer, with which the
paper explains the effect.
"""

import argparse
import inspect
import random
import re

import machine
import plot
import torch

from easyllm.batches.packing import Batch, pack
from easyllm.examples.sample import Sample
from easyllm.nn.config import AttentionConfig, GLUConfig, LayerConfig, ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear
from easyllm.train.objectives import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig

WIDTH, HEADS, RATE = 128, 4, 1e-3
FIGURE = machine.HERE.parent / "docs" / "figures" / "norm_placement.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    curves, results = {}, []
    for placement in ("pre", "post"):
        runs = [train(placement, options.layers, options.steps, s) for s in range(options.seeds)]
        for seed, (losses, norms) in enumerate(runs):
            results.append(
                {
                    "placement": placement,
                    "seed": seed,
                    "last_20_loss_nats": round(sum(losses[-20:]) / 20, 3),
                    "first_gradient_norm": {k: float(f"{v:.3g}") for k, v in norms.items()},
                }
            )
        means = [sum(step) / len(runs) for step in zip(*(r[0] for r in runs), strict=True)]
        curves[f"{placement}-norm"] = [(i + 1, loss) for i, loss in enumerate(smooth(means))]
    plot.write_lines(
        FIGURE,
        f"{options.layers} layers, AdamW at {RATE:g} from the first step, no warm-up",
        curves,
        x_title="step",
        y_title="loss, nats per byte",
    )
    row = machine.row(
        "norm-placement",
        shape={"layers": options.layers, "width": WIDTH, "steps": options.steps},
        learning_rate=RATE,
        results=results,
    )
    machine.finish(row, "norm_placement", record=options.record)


def train(
    placement: str, num_layers: int, steps: int, seed: int
) -> tuple[list[float], dict[str, float]]:
    """Returns all losses, and the first step's gradient norms in the first and last layer."""
    layer = LayerConfig(
        mixer=AttentionConfig(num_heads=HEADS, num_kv_heads=HEADS, head_dim=WIDTH // HEADS),
        feed_forward=GLUConfig(intermediate_size=3 * WIDTH),
        norm_placement=placement,
    )
    config = ModelConfig(
        family="easyllm",
        vocab_size=256,
        hidden_size=WIDTH,
        layers=(layer,) * num_layers,
        max_seq_len=128,
        final_norm=placement == "pre",
        tie_embeddings=False,
    )
    model = Decoder(config)
    initialise(model, torch.Generator().manual_seed(seed))
    model.requires_grad_(True).train()
    optimizer = MasterOptimizer(dict(model.named_parameters()), AdamWConfig(learning_rate=RATE))
    losses, norms = [], dict[str, float]()
    for batch in batches(steps, seed):
        out = LanguageModel().loss(model, batch)
        (out.sum / out.num_tokens).backward()
        if not norms:
            norms = {
                "first_layer": gradient_norm(model.layers[0]),
                "last_layer": gradient_norm(model.layers[-1]),
            }
        optimizer.step(1.0)
        losses.append(out.sum.item() / out.num_tokens)
    return losses, norms


def initialise(model: Decoder, generator: torch.Generator) -> None:
    """Applies Xavier initialisation, as in the paper, which does not shrink with depth.

    Our default, GPT-2's, does, which makes post-norm trainable.
    """
    model.reset_parameters(generator=generator)
    for module in model.modules():
        if isinstance(module, Linear):
            torch.nn.init.xavier_normal_(module.weight, generator=generator)


def gradient_norm(layer: torch.nn.Module) -> float:
    """Returns the gradient norm of the layer's last projection, as in the paper's figure 3."""
    return float(layer.feed_forward.down_proj.weight.grad.norm())


def batches(steps: int, seed: int) -> list[Batch]:
    """Returns batches of English bytes: a text next to this checkout, else Python's own docs."""
    file = machine.SHARED / "data" / "tinyshakespeare.txt"
    text = file.read_bytes() if file.is_file() else (inspect.getdoc(re) or "").encode()
    generator = random.Random(seed)

    def sample() -> Sample:
        start = generator.randrange(len(text) - 129)
        return Sample.from_mask(text[start : start + 129])

    return [pack([sample() for _ in range(4)]) for _ in range(steps)]


def smooth(values: list[float], over: int = 10) -> list[float]:
    """Returns moving averages over the last `over` values."""
    return [
        sum(values[max(0, i - over + 1) : i + 1]) / min(over, i + 1) for i in range(len(values))
    ]


if __name__ == "__main__":
    main()
