"""Greedy, beam search and sampling: likelihood, repetition, and when beam search is greedy."""

from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.engine import LLM, Completion, SamplingParams
from easyllm.engine.params import BeamParams
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_texts import small_language_model

PROMPTS = ("In the morning", "Emma found a", "They walked to", "Last winter Hugo")


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 3, "length": 12, "beams": (1, 2)}

    steps: PositiveInt = Field(default=120, le=5000, description="Training steps of the model.")
    length: PositiveInt = Field(default=60, ge=8, le=400, description="Tokens of a completion.")
    beams: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 4, 8),
        min_length=2,
        max_length=6,
        description="Beam widths to compare, the first 1.",
    )


def run(parameters: Parameters) -> Result:
    """Trains a small model, and continues the same prompts in several ways."""
    model, tokenizer, _ = small_language_model(steps=parameters.steps, seed=parameters.seed)
    llm = LLM(model=model, tokenizer=tokenizer, num_pages=256)
    length, seed = parameters.length, parameters.seed
    ways = {
        "greedy": SamplingParams(temperature=0, max_tokens=length, ignore_eos=True),
        "temperature 1": SamplingParams(max_tokens=length, ignore_eos=True, seed=seed),
        "top-p 0.9": SamplingParams(top_p=0.9, max_tokens=length, ignore_eos=True, seed=seed),
        "typical 0.9": SamplingParams(typical_p=0.9, max_tokens=length, ignore_eos=True, seed=seed),
        "greedy, penalty 1.3": SamplingParams(
            temperature=0, repetition_penalty=1.3, max_tokens=length, ignore_eos=True
        ),
    }
    found = {name: llm.generate(list(PROMPTS), params) for name, params in ways.items()}
    repeated = {name: _repetition(completions) for name, completions in found.items()}
    again = llm.generate(list(PROMPTS), ways["temperature 1"])
    same = all(
        a.token_ids == b.token_ids for a, b in zip(again, found["temperature 1"], strict=True)
    )
    scores, first = list[tuple[float, float]](), list[Completion]()
    short = min(length, 24)
    greedy = llm.generate(
        list(PROMPTS), ways["greedy"].model_copy(update={"max_tokens": short, "ignore_eos": False})
    )
    for width in parameters.beams:
        best = llm.beam_search(
            list(PROMPTS), BeamParams(num_beams=width, max_tokens=short, length_penalty=0.0)
        )
        scores.append((float(width), sum(sum(c.logprobs) for c in best) / len(best)))
        first = first or best
    equal = all(a.token_ids == b.token_ids for a, b in zip(first, greedy, strict=True))
    return Result(
        numbers=[
            *(
                number(
                    f"repeated_{name.split(',')[0].replace(' ', '_')}"
                    f"{'_penalty' if 'penalty' in name else ''}",
                    share,
                    f"share of repeated 4-grams, {name}",
                    f"重复的 4-gram 占比，{_ZH[name]}",
                )
                for name, share in repeated.items()
            ),
            *(
                number(
                    f"beam_{int(width)}",
                    score,
                    f"log-probability, beam width {int(width)}",
                    f"对数概率，束宽 {int(width)}",
                )
                for width, score in scores
            ),
            number(
                "beam_1_is_greedy",
                int(equal),
                "beam width 1 is greedy (1 = yes)",
                "束宽 1 即贪心（1 = 是）",
            ),
            number(
                "seed_repeats",
                int(same),
                "the same seed gives the same text (1 = yes)",
                "相同种子得到相同文本（1 = 是）",
            ),
        ],
        figures=[
            Bars(
                title="Repetition",
                x="",
                y="share of 4-grams seen before",
                groups=list(repeated),
                series={"repeated": list(repeated.values())},
            ),
            Lines(
                title="Beam search",
                x="beam width",
                y="mean log-probability, nats",
                lines={"best hypothesis": scores},
                marks=True,
            ),
        ],
        claims=[
            claim(
                (
                    "Greedy decoding falls into repetition, sampling does not "
                    "(arXiv 1904.09751); beam search with one beam is greedy, and wider beams find "
                    "likelier texts.",
                    "贪心解码会陷入重复，采样不会（arXiv 1904.09751）；束宽为 1 的束搜索就是贪心，"
                    "更宽的束找到概率更高的文本。",
                ),
                (
                    f"Repeated 4-grams: greedy {repeated['greedy']:.0%}, top-p "
                    f"{repeated['top-p 0.9']:.0%}; log-probability {scores[0][1]:.2f} with one "
                    f"beam and {scores[-1][1]:.2f} with {int(scores[-1][0])}.",
                    f"重复的 4-gram：贪心 {repeated['greedy']:.0%}，top-p "
                    f"{repeated['top-p 0.9']:.0%}；束宽 1 的对数概率 {scores[0][1]:.2f}，束宽 "
                    f"{int(scores[-1][0])} 为 {scores[-1][1]:.2f}。",
                ),
                "reproduced"
                if equal
                and repeated["greedy"] > repeated["top-p 0.9"]
                and scores[-1][1] >= scores[0][1]
                else "not",
            )
        ],
        series={"texts": {name: found[name][0].text for name in found}},
    )


def _repetition(completions: list[Completion]) -> float:
    """Returns the share of 4-grams that occurred before in the same completion."""
    repeated, total = 0, 0
    for completion in completions:
        ids = completion.token_ids
        grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / max(1, total)


_ZH = {
    "greedy": "贪心",
    "temperature 1": "温度 1",
    "top-p 0.9": "top-p 0.9",
    "typical 0.9": "典型 0.9",
    "greedy, penalty 1.3": "贪心，惩罚 1.3",
}

LAB = Lab(
    name="decoding",
    rows=(61, 63),
    chapter="inference",
    title=Text("Greedy, beam search and sampling", "贪心、束搜索与采样"),
    seconds=40,
    parameters=Parameters,
    run=run,
)
