"""Padding: how many tokens are computed for nothing, and why generation pads on the left."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.batches.collate import left_pad, next_logits, right_pad, score_padded
from easyllm.batches.packing import split_by_tokens
from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.lab.small_models import new_model, small_config


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"texts": 32, "longest": 64}

    texts: PositiveInt = Field(default=256, ge=8, le=10_000, description="Number of texts.")
    longest: PositiveInt = Field(default=256, ge=16, le=512, description="Longest, in tokens.")
    batch_size: PositiveInt = Field(default=8, ge=2, le=256, description="Texts in a batch.")


@torch.no_grad()
def run(parameters: Parameters) -> Result:
    """Pads the same texts to a fixed length, to the longest of a batch, and packs them."""
    generator = torch.Generator().manual_seed(parameters.seed)
    shape = torch.rand(parameters.texts, generator=generator).square()
    lengths = [max(4, int(parameters.longest * x)) for x in shape.tolist()]
    texts = [torch.randint(1, 64, (n,), generator=generator).tolist() for n in lengths]
    size = parameters.batch_size
    used = sum(lengths)
    in_order = _padded(lengths, size)
    sorted_first = _padded(sorted(lengths), size)
    budget = size * parameters.longest
    packs = split_by_tokens([Sample.from_mask([*t, 0]) for t in texts], budget)
    computed = {
        "fixed length": parameters.longest * len(texts),
        "longest of the batch": in_order,
        "sorted by length": sorted_first,
        "packed": sum(s.num_tokens for group in packs for s in group),
    }
    model = new_model(small_config(width=32), parameters.seed)
    model.reset_parameters(std=0.3, generator=torch.Generator().manual_seed(parameters.seed))
    model.requires_grad_(False).eval()
    few = [t for t in texts if len(t) < parameters.longest][:6]
    fixed, dynamic = right_pad(few, 0, length=parameters.longest), right_pad(few, 0)
    a = score_padded(model, fixed.token_ids, fixed.mask)
    b = score_padded(model, dynamic.token_ids, dynamic.mask)
    loss_apart = abs(float(a.sum() - b.sum())) / abs(float(a.sum()))
    left = left_pad(few, 0)
    alone = torch.stack([model.logits(t)[-1] for t in few])
    left_error = float((next_logits(model, left.token_ids, left.mask) - alone).abs().max())
    # the last column of a right-padded batch, read without the mask
    naive = torch.stack([model.logits(row)[-1] for row in dynamic.token_ids])
    wrong = int((naive.argmax(-1) != alone.argmax(-1)).sum())
    padded_rows = int((dynamic.mask[:, -1] == 0).sum())
    wasted = {name: 1 - used / tokens for name, tokens in computed.items()}
    return Result(
        numbers=[
            *(
                number(
                    f"wasted_{name.replace(' ', '_')}",
                    max(share, 0.0),
                    f"share of computed tokens that is padding, {name}",
                    f"填充在计算的词元中的占比，{_ZH[name]}",
                )
                for name, share in wasted.items()
            ),
            number(
                "loss_apart",
                loss_apart,
                "loss, fixed against dynamic padding, relative",
                "固定与动态填充的损失之差，相对",
                2,
            ),
            number(
                "left_error",
                left_error,
                "next logits, left-padded batch against alone",
                "左填充的批与单独计算的下一词元 logits 之差",
                2,
            ),
            number(
                "wrong",
                wrong,
                f"of {padded_rows} padded rows whose next token is wrong if the last column is "
                "read",
                f"{padded_rows} 个有填充的行中，直接读最后一列时下一词元错误的行数",
            ),
        ],
        figures=[
            Bars(
                title=f"{len(texts)} texts of up to {parameters.longest} tokens, batches of {size}",
                x="how they are put together",
                y="tokens computed / tokens of text",
                groups=list(computed),
                series={"ratio": [tokens / used for tokens in computed.values()]},
            )
        ],
        claims=[
            claim(
                (
                    "The articles (zhihu 341994096 and 646852375): a collator pads each batch to "
                    "its own longest text; decoder-only models are padded on the left, because "
                    "the last logit must be that of a real token.",
                    "文章（知乎 341994096 与 646852375）：collator 把每批填充到该批最长的文本；"
                    "decoder-only 模型在左侧填充，因为最后一个 logit 必须来自真实词元。",
                ),
                (
                    f"Padding takes {wasted['fixed length']:.0%} of the work at a fixed length, "
                    f"{wasted['longest of the batch']:.0%} per batch, none when packed; losses "
                    f"differ by {loss_apart:.0e}; left padding by {left_error:.0e}; the last "
                    f"column of a right-padded batch gives {wrong} of {padded_rows} wrong tokens.",
                    f"固定长度时填充占 {wasted['fixed length']:.0%}，按批为 "
                    f"{wasted['longest of the batch']:.0%}，打包则没有；损失相差 {loss_apart:.0e}；"
                    f"左填充相差 {left_error:.0e}；读右填充批的最后一列，{padded_rows} 个中有 "
                    f"{wrong} 个错误。",
                ),
                "reproduced" if loss_apart < 1e-5 and left_error < 1e-3 and wrong > 0 else "not",
            )
        ],
    )


_ZH = {
    "fixed length": "固定长度",
    "longest of the batch": "按批最长",
    "sorted by length": "按长度排序",
    "packed": "打包",
}


def _padded(lengths: list[int], size: int) -> int:
    batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return sum(max(batch) * len(batch) for batch in batches)


LAB = Lab(
    name="padding",
    rows=(70, 71),
    chapter="data",
    title=Text("Padding, packing, and the left side", "填充、打包与左侧"),
    seconds=4,
    parameters=Parameters,
    run=run,
)
