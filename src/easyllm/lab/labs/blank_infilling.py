"""GLM's objective: spans are masked, shuffled and generated, seeing the text on both sides."""

import math
import random
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.examples.blank_infilling import BlankTokens, infilled, poisson_spans
from easyllm.examples.sample import POSITION_ROWS, Sample
from easyllm.lab.lab import Grid, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import mean_loss, new_model, smoothed, token_chains, train_small
from easyllm.models.families import family_of
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.train.objectives.blank_infilling import BlankInfilling

VOCABULARY = 32
MASK, SENTENCE, DOCUMENT, START, END = range(VOCABULARY, VOCABULARY + 5)
TOKENS = BlankTokens(
    mask=MASK, sentence_mask=SENTENCE, document_mask=DOCUMENT, start=START, end=END
)
FIGURE = ([1, 2, 3, 4, 5, 5, 5, 5, 3, 3], [0, 0, 0, 0, 0, 1, 2, 3, 1, 2])
"""Both positions of the paper's figure 2, counted from 1."""
NAMES = ("x1", "x2", "M", "x4", "M", "S", "x5", "x6", "S", "x3")


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 6, "draws": 300}

    mask_ratio: float = Field(default=0.15, gt=0, lt=0.9, description="Share of masked tokens.")
    mean_span: PositiveFloat = Field(default=3.0, le=30, description="λ of the lengths of spans.")
    draws: PositiveInt = Field(
        default=2000, ge=20, le=50_000, description="Texts of the histogram."
    )
    steps: PositiveInt = Field(default=200, le=5000, description="Training steps.")


def run(parameters: Parameters) -> Result:
    """Builds the paper's example, draws spans, and trains a small ChatGLM."""
    example = infilled([1, 2, 3, 4, 5, 6], [(2, 3), (4, 6)], [1, 0], MASK, TOKENS)
    rows = example.extras[POSITION_ROWS]
    positions = ([p + 1 for p, _ in rows], [b for _, b in rows])
    same = positions == FIGURE
    model = new_model(_config(), parameters.seed)
    seen = _visible(model, list(example.token_ids), prefix=5)
    draw = random.Random(parameters.seed)
    lengths, shares = _lengths(parameters, draw)
    generator = torch.Generator().manual_seed(parameters.seed)
    texts = token_chains(generator, 8 * parameters.steps + 32, vocab_size=VOCABULARY)
    samples = [_blanked(text, parameters, draw) for text in texts]
    start = mean_loss(model, samples[:32])
    losses = train_small(
        model,
        samples[32:],
        steps=parameters.steps,
        batch_size=8,
        warmup=10,
        seed=parameters.seed,
        objective=BlankInfilling(),
    )
    end = mean_loss(model, samples[:32])
    mean = sum(n * share for n, share in lengths)
    return Result(
        numbers=[
            number(
                "same",
                int(same),
                "positions equal to the paper's figure (1: yes)",
                "位置与论文图示相同（1：是）",
            ),
            number(
                "share", sum(shares) / len(shares), "share of masked tokens", "被遮盖词元的比例"
            ),
            number("mean_length", mean, "mean length of a span", "片段的平均长度"),
            number(
                "prefix_pairs",
                sum(map(sum, (row[:5] for row in seen[:5]))),
                "of 25 pairs of the corrupted text that see each other",
                "被遮盖文本 25 对中互相可见的对数",
            ),
            number(
                "leaks",
                sum(seen[i][j] for i in range(10) for j in range(max(i + 1, 5), 10)),
                "later tokens that are seen",
                "可见的后续词元数",
            ),
            number("start", start, "loss before training, nats", "训练前的损失，nats"),
            number("end", end, "loss after training, nats", "训练后的损失，nats"),
        ],
        figures=[
            Grid(
                title="Measured: which token sees which",
                x="input that is changed",
                y="output that changes",
                values=seen,
                x_labels=NAMES,
                y_labels=NAMES,
            ),
            Lines(
                title=f"Lengths of spans, λ = {parameters.mean_span:g}",
                x="tokens",
                y="share",
                lines={"spans": lengths},
                marks=True,
            ),
            Lines(
                title="Blank infilling on chains of tokens",
                x="step",
                y="loss, nats per token",
                lines={"loss": smoothed(losses)},
            ),
        ],
        claims=[
            claim(
                (
                    "GLM (arXiv 2103.10360, figure 2): the first position of a span's tokens is "
                    "that of its mask, the second counts within the span; part A is bidirectional, "
                    "part B causal.",
                    "GLM（arXiv 2103.10360，图 2）：片段词元的第一位置是其遮盖符的位置，"
                    "第二位置在片段内计数；A 部分双向，B 部分因果。",
                ),
                (
                    f"The example's positions are {'equal' if same else 'different'}; the 5 tokens "
                    "of the text see each other, and no token sees a later one of a span.",
                    f"示例的位置{'相同' if same else '不同'}；文本的 5 个词元互相可见，"
                    "没有词元看到片段中更靠后的词元。",
                ),
                "reproduced" if same else "not",
            ),
            claim(
                (
                    "Spans have lengths drawn from a Poisson distribution with λ = 3 and cover 15% "
                    "of the tokens.",
                    "片段长度取自 λ = 3 的泊松分布，覆盖 15% 的词元。",
                ),
                (
                    f"{sum(shares) / len(shares):.1%} of the tokens, {mean:.2f} tokens a span; the "
                    f"loss falls from {start:.2f} to {end:.2f} (ln V = "
                    f"{math.log(VOCABULARY):.2f}).",
                    f"覆盖 {sum(shares) / len(shares):.1%}，平均 {mean:.2f} 个词元；损失从 "
                    f"{start:.2f} 降到 "
                    f"{end:.2f}（ln V = {math.log(VOCABULARY):.2f}）。",
                ),
                "reproduced"
                if abs(sum(shares) / len(shares) - parameters.mask_ratio) < 0.02
                else "not",
                (
                    "No span has length 0, which raises the mean; the last one is cut to meet the "
                    "share, which lowers it.",
                    "没有长度为 0 的片段，使平均值升高；最后一个片段被截短以满足比例，使其降低。",
                ),
            ),
        ],
    )


def _config() -> ModelConfig:
    return family_of("chatglm").read_config(
        {
            "model_type": "chatglm",
            "vocab_size": VOCABULARY + 5,
            "hidden_size": 32,
            "inner_hidden_size": 64,
            "num_layers": 2,
            "num_attention_heads": 2,
        }
    )


@torch.no_grad()
def _visible(model: Decoder, ids: list[int], prefix: int) -> list[list[float]]:
    """Returns 1 where another input token changes the logits at a position, else 0."""
    model.eval()
    before = model.logits(torch.tensor(ids), prefix=prefix)
    rows = []
    for place in range(len(ids)):
        changed = [*ids]
        changed[place] = (changed[place] + 7) % VOCABULARY
        after = model.logits(torch.tensor(changed), prefix=prefix)
        rows.append(((after - before).abs().amax(-1) > 0).float())
    model.train()
    found: list[list[float]] = torch.stack(rows, dim=1).tolist()
    return found


def _lengths(
    parameters: Parameters, draw: random.Random
) -> tuple[list[tuple[float, float]], list[float]]:
    """Returns (length, share of the spans), and the masked share of each text of 200 tokens."""
    sizes, shares = list[int](), list[float]()
    for _ in range(parameters.draws):
        spans = poisson_spans(200, ratio=parameters.mask_ratio, mean=parameters.mean_span, rng=draw)
        sizes += [end - start for start, end in spans]
        shares.append(sum(end - start for start, end in spans) / 200)
    return [(float(n), sizes.count(n) / len(sizes)) for n in range(1, max(sizes) + 1)], shares


def _blanked(text: Sample, parameters: Parameters, draw: random.Random) -> Sample:
    ids = list(text.token_ids)
    spans = poisson_spans(
        len(ids), ratio=parameters.mask_ratio, mean=parameters.mean_span, rng=draw
    )
    order = draw.sample(range(len(spans)), len(spans))
    return infilled(ids, spans, order, MASK, TOKENS)


LAB = Lab(
    name="blank-infilling",
    rows=(33,),
    chapter="models",
    title=Text("GLM: filling in blanks", "GLM：自回归填空"),
    seconds=15,
    parameters=Parameters,
    run=run,
)
