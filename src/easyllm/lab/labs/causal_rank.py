"""Masks and rank: a causal attention matrix is invertible, a bidirectional linear one is not."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Grid, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.ops.attention import attention
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.linear_attention import FEATURE_MAPS, Features, weights


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"tokens": 24}

    tokens: PositiveInt = Field(default=64, ge=8, le=512, description="Length of the sequence.")
    head_dim: PositiveInt = Field(default=8, le=64, description="Width of a head.")
    prefix: PositiveInt = Field(default=8, le=512, description="Prompt tokens of the prefix mask.")


def run(parameters: Parameters) -> Result:
    """Computes attention matrices under three masks, and their singular values."""
    generator = torch.Generator().manual_seed(parameters.seed)
    length, width = parameters.tokens, parameters.head_dim
    q, k = torch.randn(2, length, 1, width, generator=generator, dtype=torch.float64)
    matrices = {
        "causal softmax": _matrix(q, k, causal=True),
        "bidirectional softmax": _matrix(q, k, causal=False),
        "prefix softmax": _matrix(q, k, causal=True, prefix=min(parameters.prefix, length)),
    }
    kind = FEATURE_MAPS["elu"]
    features = Features.plain(kind.query(q), kind.key(k), torch.zeros_like(q))
    matrices["bidirectional linear"] = weights(features, kind, causal=False)[0]
    matrices["causal linear"] = weights(features, kind, causal=True)[0]
    ranks = {name: int(torch.linalg.matrix_rank(m)) for name, m in matrices.items()}
    causal = matrices["causal softmax"]
    log_det = float(torch.linalg.slogdet(causal).logabsdet)
    diagonal = float(causal.diagonal().log().sum())
    apart = abs(log_det - diagonal)
    least = float(torch.linalg.svdvals(causal)[-1])
    curves = {}
    for name, matrix in matrices.items():
        values = torch.linalg.svdvals(matrix)
        curves[name] = [(float(i + 1), max(float(s), 1e-18)) for i, s in enumerate(values)]
    zh = {
        "causal softmax": "因果 softmax",
        "bidirectional softmax": "双向 softmax",
        "prefix softmax": "前缀 softmax",
        "bidirectional linear": "双向线性",
        "causal linear": "因果线性",
    }
    return Result(
        numbers=[
            *(
                number(f"rank_{name.replace(' ', '_')}", rank, f"rank, {name}", f"秩，{zh[name]}")
                for name, rank in ranks.items()
            ),
            number(
                "least_singular_value",
                least,
                "smallest singular value, causal softmax",
                "最小奇异值，因果 softmax",
                2,
            ),
            number(
                "log_det_difference",
                apart,
                "|ln det − Σ ln diagonal|, causal softmax",
                "|ln det − Σ ln 对角线|，因果 softmax",
                2,
            ),
        ],
        figures=[
            Grid(
                title="Prefix mask: attention weights",
                x="key",
                y="query",
                values=[
                    [round(v, 4) for v in row]
                    for row in matrices["prefix softmax"][:24, :24].tolist()
                ],
            ),
            Lines(
                title="Singular values of attention matrices",
                x="index",
                y="singular value",
                lines=curves,
                log_y=True,
            ),
        ],
        claims=[
            claim(
                (
                    "The article (spaces.ac.cn 9529): a causal softmax matrix is triangular with a "
                    "positive diagonal, so its determinant is positive and its rank full; "
                    "bidirectional attention may lose rank.",
                    "文章（spaces.ac.cn 9529）：因果 softmax 矩阵是对角线为正的三角矩阵，"
                    "行列式为正，必满秩；双向注意力可能降秩。",
                ),
                (
                    f"ln det equals the sum of the logarithms of the diagonal within {apart:.0e}, "
                    f"{log_det:.0f}; the smallest singular value is {least:.0e}, so fp64 finds a "
                    f"rank of {ranks['causal softmax']} of {length}; bidirectional linear "
                    f"attention has rank {ranks['bidirectional linear']} with heads of width "
                    f"{width}.",
                    f"ln det 与对角线对数之和相差 {apart:.0e}，为 {log_det:.0f}；最小奇异值为 "
                    f"{least:.0e}，"
                    f"因此 fp64 得到的秩为 {ranks['causal softmax']}（共 {length}）；"
                    f"头宽为 {width} 的双向线性注意力的秩为 {ranks['bidirectional linear']}。",
                ),
                "reproduced"
                if apart < 1e-6 and ranks["bidirectional linear"] <= width
                else "direction",
                (
                    "Full rank in exact arithmetic; in floating point the matrix may be so badly "
                    "conditioned that the rank counted is lower. Random bidirectional softmax "
                    "matrices have full rank, too.",
                    "精确算术下满秩；浮点下矩阵可能病态，数出的秩更低。随机的双向 softmax "
                    "矩阵也满秩。",
                ),
            )
        ],
    )


def _matrix(q: Tensor, k: Tensor, *, causal: bool, prefix: int | None = None) -> Tensor:
    """Returns the weights [T, T]: what attention does to values that are the identity."""
    length = len(q)
    values = torch.eye(length, dtype=q.dtype)[:, None]
    rule = AttentionRule(scale=q.shape[-1] ** -0.5, causal=causal)
    prefixes = None if prefix is None else (prefix,)
    return attention(q, k, values, rule, (length,), prefixes)[:, 0]


LAB = Lab(
    name="causal-rank",
    rows=(7,),
    chapter="attention",
    title=Text("Masks, and the rank of attention", "掩码与注意力矩阵的秩"),
    seconds=2,
    parameters=Parameters,
    run=run,
)
