"""Is a loss normal? A band from a few runs, and five planted faults that leave it."""

import json
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.reporting.expected import LOSS, NORM, Band, Watch, make_band
from easyllm.reporting.expected_callback import verdict
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import TokenizerConfig
from easyllm.train import TrainConfig, train
from easyllm.train.metrics import read_metrics

ROWS = 320
FAULTS = {
    "rate x 30": (r"learning_rate is 30", "学习率 × 30"),
    "rate / 30": (r"learning_rate is 30 times smaller", "学习率 ÷ 30"),
    "prompts trained": (r"data\.train_on was changed", "连提示一起训练"),
    "repeated rows": (r"rows occur several times", "行大量重复"),
    "answers of other rows": (r"answers do not follow from their prompts", "答案与提示错配"),
}
"""For each planted fault, what the cause that names it says, and its Chinese name."""
PLACES = {
    "baker": "the bakery",
    "doctor": "the hospital",
    "farmer": "the field",
    "judge": "the court",
    "sailor": "the harbour",
    "teacher": "the school",
}
Lines_ = list[JsonObject]


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 24, "runs": 2}

    steps: PositiveInt = Field(default=200, ge=20, le=5000, description="Steps of each run.")
    runs: PositiveInt = Field(default=3, ge=2, le=20, description="Healthy runs of the band.")


def run(parameters: Parameters) -> Result:
    """Trains healthy runs with several seeds, then one run with each fault."""
    with tempfile.TemporaryDirectory(prefix="easyllm-lab-") as name:
        folder = Path(name)
        healthy = _config(folder, parameters)
        _write_rows(folder, parameters.seed)
        runs = [
            _metrics(healthy | {"seed": parameters.seed + number_of}, folder / f"run{number_of}")
            for number_of in range(parameters.runs)
        ]
        config = TrainConfig.model_validate(healthy).model_dump(mode="json")
        band = replace(make_band("lab", config, runs), whole={})  # times differ between runs
        found = {"healthy": _check(band, healthy, runs[0])}
        curves = {"healthy": runs[0]}
        for fault in FAULTS:
            _write_rows(folder, parameters.seed, fault)
            changed = _config(folder, parameters, fault) | {"seed": parameters.seed}
            curves[fault] = _metrics(changed, folder / re.sub(r"\W+", "-", fault))
            found[fault] = _check(band, changed, curves[fault])
    places = {fault: _place(found[fault], FAULTS[fault][0]) for fault in FAULTS}
    flagged = sum(_is_outside(found[fault]) for fault in FAULTS)
    named = sum(place is not None for place in places.values())
    first = sum(place == 1 for place in places.values())
    return Result(
        numbers=[
            number(
                "healthy",
                int(not _is_outside(found["healthy"])),
                "a healthy run is inside (1: yes)",
                "健康的运行在范围内（1：是）",
            ),
            number(
                "flagged",
                flagged,
                f"of {len(FAULTS)} faults outside the band",
                f"{len(FAULTS)} 个故障中超出范围的个数",
            ),
            number(
                "named",
                named,
                "faults that are among the causes named",
                "列出的原因中包含该故障的个数",
            ),
            number("first", first, "faults that are the first cause", "排在第一位的个数"),
            *(
                number(
                    f"place_{number_of}",
                    place,
                    f"place of the cause: {fault}",
                    f"原因的位次：{FAULTS[fault][1]}",
                )
                for number_of, (fault, place) in enumerate(places.items(), 1)
            ),
        ],
        figures=[
            Lines(
                title="Loss, and the band of healthy runs",
                x="step",
                y="nats per token",
                lines=_loss_lines(band, curves),
                log_y=True,
            ),
            Bars(
                title="Mean gradient norm at the end",
                x="run",
                y="norm / upper end of the band",
                groups=list(curves),
                series={
                    "norm": [_last_norm(band, lines) for lines in curves.values()],
                },
                log_y=True,
            ),
        ],
        claims=[
            claim(
                (
                    "A run that goes wrong looks different from the loss, the gradient norm and "
                    "what was changed; each recipe ships the band of healthy runs.",
                    "出错的运行可以从损失、梯度范数与所做的改动看出；各配方附带健康运行的范围。",
                ),
                (
                    f"{flagged} of {len(FAULTS)} planted faults leave the band; {named} are among "
                    f"the causes that are named, {first} as the first.",
                    f"{len(FAULTS)} 个故障中 {flagged} 个超出范围；{named} 个出现在列出的原因中，"
                    f"{first} 个排在第一。",
                ),
                "reproduced" if flagged == named == len(FAULTS) else "direction",
                (
                    "Small models; a cause is a guess from symptoms, not a proof.",
                    "这里是小模型；原因是根据症状的推测，不是证明。",
                ),
            )
        ],
        series={"verdicts": {name: list(lines) for name, lines in found.items()}},
    )


def _config(folder: Path, parameters: Parameters, fault: str = "") -> JsonObject:
    """Returns the recipe, with a fault of its own settings."""
    factor = {"rate x 30": 30.0, "rate / 30": 1 / 30}.get(fault, 1.0)
    return {
        "model": {
            "tokenizer": str(folder / "tokenizer"),
            "max_seq_len": 64,
            "config": {
                "model_type": "llama",
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "hidden_size": 64,
                "intermediate_size": 128,
                "tie_word_embeddings": True,
            },
        },
        "data": {
            "train": [str(folder / "rows.jsonl")],
            "max_seq_len": 64,
            "train_on": "all" if fault == "prompts trained" else "assistant",
        },
        "optimizer": {"learning_rate": 2e-3 * factor},
        "schedule": {"kind": "constant"},
        "batch_size": 16,
        "max_steps": parameters.steps,
        "epochs": 1000,
        "precision": "fp32",
        "log_every": 1,
    }


def _write_rows(folder: Path, seed: int, fault: str = "") -> None:
    """Writes questions whose answers follow from them, with a fault of the rows; trains tokens."""
    draw = random.Random(seed)
    rows = []
    for _ in range(ROWS):
        who = draw.choice(tuple(PLACES))
        rows.append({"prompt": f"Where does the {who} work?", "completion": f"In {PLACES[who]}."})
    if fault == "repeated rows":
        rows = rows[:2] * (ROWS // 2)
    if fault == "answers of other rows":
        answers = [row["completion"] for row in rows]
        draw.shuffle(answers)
        rows = [row | {"completion": a} for row, a in zip(rows, answers, strict=True)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    if not (folder / "tokenizer").exists():
        config = TokenizerConfig(
            vocab_size=400,
            special_tokens=("<|endoftext|>",),
            eos="<|im_end|>",
            pad="<|endoftext|>",
            chat_template="chatml",
        )
        texts = [" ".join(row.values()) for row in rows]
        train_tokenizer(texts, config).save(folder / "tokenizer")


def _metrics(config: JsonObject, output: Path) -> Lines_:
    train(TrainConfig.model_validate(config), output)
    return [line for line in read_metrics(output) if LOSS in line]


def _check(band: Band, config: JsonObject, lines: Sequence[JsonObject]) -> list[str]:
    """Returns what `easyllm train` says first when a run leaves the band, else at its end."""
    watch, said = Watch(band), list[str]()
    values = TrainConfig.model_validate(config).model_dump(mode="json")
    for line in lines:
        watch.add({k: float(v) for k, v in line.items() if isinstance(v, int | float)})
        if line["step"] in band.steps:
            said = verdict(watch, values)
            if _is_outside(said):
                break
    return said


def _is_outside(lines: Sequence[str]) -> bool:
    return bool(lines) and lines[0].startswith("not as expected")


def _place(lines: Sequence[str], pattern: str) -> int | None:
    """Returns which of the causes names a fault, from 1; None if none does."""
    return next((i for i, line in enumerate(lines[1:], 1) if re.search(pattern, line)), None)


def _loss_lines(band: Band, curves: dict[str, Lines_]) -> dict[str, list[tuple[float, float]]]:
    ranges = band.by_step[LOSS]
    lines = {
        "band, low": [
            (float(s), max(r.low, 1e-3)) for s, r in zip(band.steps, ranges, strict=True)
        ],
        "band, high": [(float(s), r.high) for s, r in zip(band.steps, ranges, strict=True)],
    }
    top = 2 * ranges[0].high
    for name, each in curves.items():
        lines[name] = [(float(x["step"]), min(float(x[LOSS]), top)) for x in each]
    return lines


def _last_norm(band: Band, lines: Sequence[JsonObject]) -> float:
    tail = [float(line[NORM]) for line in lines if line["step"] > band.steps[-2]]
    return max(1e-6, sum(tail) / len(tail) / band.by_step[NORM][-1].high)


LAB = Lab(
    name="oracle",
    rows=(35, 36),
    chapter="training",
    title=Text("Is my loss normal?", "我的损失正常吗？"),
    seconds=40,
    parameters=Parameters,
    run=run,
)
