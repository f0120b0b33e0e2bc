"""Temperature, top-k, top-p, min-p, typical sampling, and penalties: what each keeps."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.engine.params import SamplingParams
from easyllm.engine.processors import penalise_output, penalise_repetition
from easyllm.engine.sampling import apply_sampling_filters
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"vocabulary": 100}

    vocabulary: PositiveInt = Field(default=2000, ge=50, le=100_000, description="Tokens.")
    exponent: PositiveFloat = Field(default=1.2, le=5, description="Zipf exponent of the tokens.")
    temperature: PositiveFloat = Field(default=0.7, le=10, description="Temperature to compare.")


def run(parameters: Parameters) -> Result:
    """Filters a flat and a peaked distribution, and penalises tokens of a prompt."""
    ranks = torch.arange(1, parameters.vocabulary + 1, dtype=torch.float64)
    flat = -parameters.exponent * ranks.log()
    peaked = flat.clone()
    peaked[0] += 6.0
    methods = {
        "temperature": SamplingParams(temperature=parameters.temperature),
        "top-k 40": SamplingParams(top_k=40),
        "top-p 0.9": SamplingParams(top_p=0.9),
        "min-p 0.1": SamplingParams(min_p=0.1),
        "typical 0.5": SamplingParams(typical_p=0.5),
    }
    kept, curves = {}, {}
    for name, params in methods.items():
        logits = apply_sampling_filters(torch.stack([flat, peaked]).float(), [params, params])
        kept[name] = [int(torch.isfinite(row).sum()) for row in logits]
        curves[name] = _points(logits[0].double().softmax(0))
    curves = {"unchanged": _points(flat.softmax(0)), **curves}
    alone = apply_sampling_filters(flat.float()[None], [SamplingParams(typical_p=0.2)])
    drops_top = not bool(torch.isfinite(alone[0, 0]))
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0])
    prompt_and_output, output = torch.tensor([0, 1]), torch.tensor([1])
    repetition = penalise_repetition(logits.clone(), prompt_and_output, 2.0)
    presence = penalise_output(
        logits.clone(), output, torch.tensor([3]), presence=0.5, frequency=0.0
    )
    frequency = penalise_output(
        logits.clone(), output, torch.tensor([3]), presence=0.0, frequency=0.5
    )
    return Result(
        numbers=[
            *(
                number(
                    f"kept_{name.split()[0].replace('-', '_')}_{which}",
                    count,
                    f"tokens kept by {name}, {which} distribution",
                    f"{name} 保留的词元数，{'平坦' if which == 'flat' else '尖锐'}分布",
                )
                for name, counts in kept.items()
                for which, count in zip(("flat", "peaked"), counts, strict=True)
            ),
            number(
                "typical_drops_top",
                int(drops_top),
                "typical 0.2 drops the likeliest token of the flat one (1 = yes)",
                "typical 0.2 舍弃平坦分布中最可能的词元（1 = 是）",
            ),
            number(
                "repetition_prompt",
                float(repetition[0] - logits[0]),
                "repetition penalty 2 on a prompt token of logit 2",
                "重复惩罚 2 对提示中 logit 为 2 的词元",
            ),
            number(
                "repetition_negative",
                float(repetition[1] - logits[1]),
                "on a token of logit −1",
                "对 logit 为 −1 的词元",
            ),
            number(
                "presence",
                float(presence[1] - logits[1]),
                "presence penalty 0.5, token written 3 times",
                "存在惩罚 0.5，已写 3 次的词元",
            ),
            number(
                "frequency",
                float(frequency[1] - logits[1]),
                "frequency penalty 0.5, token written 3 times",
                "频率惩罚 0.5，已写 3 次的词元",
            ),
        ],
        figures=[
            Lines(
                title="A flat distribution after each filter",
                x="rank of the token",
                y="probability",
                lines=curves,
                log_x=True,
                log_y=True,
            )
        ],
        claims=[
            claim(
                (
                    "Typical sampling (arXiv 2202.00666) keeps tokens whose −log p is near the "
                    "entropy, so it may drop the likeliest; top-p (arXiv 1904.09751) adapts to the "
                    "distribution, top-k does not.",
                    "典型采样（arXiv 2202.00666）保留 −log p 接近熵的词元，"
                    "因此可能舍弃最可能的词元；"
                    "top-p（arXiv 1904.09751）随分布变化，top-k 不变。",
                ),
                (
                    f"Top-p keeps {kept['top-p 0.9'][0]} tokens of the flat and "
                    f"{kept['top-p 0.9'][1]} of the peaked distribution, top-k "
                    f"{kept['top-k 40'][0]} of both; typical sampling "
                    f"{'drops' if drops_top else 'keeps'} the likeliest of the flat one.",
                    f"top-p 在平坦分布保留 {kept['top-p 0.9'][0]} 个、尖锐分布保留 "
                    f"{kept['top-p 0.9'][1]} 个，top-k 都保留 {kept['top-k 40'][0]} 个；典型采样"
                    f"{'舍弃' if drops_top else '保留'}平坦分布中最可能的词元。",
                ),
                "reproduced"
                if drops_top and kept["top-p 0.9"][0] > kept["top-p 0.9"][1]
                else "direction",
            )
        ],
    )


def _points(probabilities: torch.Tensor) -> list[tuple[float, float]]:
    wanted = sorted({round(1.06**i) for i in range(140)})
    return [
        (float(r), float(probabilities[r - 1]))
        for r in wanted
        if r <= len(probabilities) and probabilities[r - 1] > 0
    ]


LAB = Lab(
    name="sampling-filters",
    rows=(60, 62),
    chapter="inference",
    title=Text("Which tokens a filter keeps", "过滤器保留哪些词元"),
    seconds=2,
    parameters=Parameters,
    run=run,
)
