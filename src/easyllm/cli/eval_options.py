"""The options of `easyllm eval`, and which of its tasks reads which."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, Field, create_model

from easyllm.cli.options import FlagGroup
from easyllm.cli.output import home_path
from easyllm.cli.scorers import METAVAR
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonMapping
from easyllm.evaluate.judge_config import JudgeConfig


class Task(StrEnum):
    """What is measured."""

    answers = "answers"
    perplexity = "perplexity"
    win_rate = "win-rate"
    elo = "elo"
    over_optimisation = "over-optimisation"
    items = "tasks of items"
    lm_eval = "lm-eval's tasks"


NAMED_TASKS = (Task.answers, Task.perplexity, Task.win_rate, Task.elo, Task.over_optimisation)


class EvalOptions(BaseModel):
    """Flags that one or more tasks read; their values are passed on by name."""

    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of a response; by default 32 (answers), the task's, else 256.",
    )
    context: int | None = Field(
        default=None,
        ge=1,
        description="perplexity: tokens per window; by default the model's context.",
    )
    stride: int | None = Field(
        default=None,
        ge=1,
        description="perplexity: tokens from one window to the next; by default half the context.",
    )
    text_key: str | None = Field(
        default=None,
        description="perplexity: key or column of the text in rows; by default text.",
    )
    against: str | None = Field(default=None, description="win-rate: the reference model.")
    judge: str | None = Field(
        default=None,
        description="win-rate: an LLM at an address with OpenAI's API, a reward model, or a rule "
        "such as digits or length,target=40.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Prompts or items to read; by default all of them."
    )
    shots: int | None = Field(
        default=None,
        ge=0,
        description="Tasks: examples before each question; by default the task's.",
    )
    choices: Literal["likelihood", "generated"] | None = Field(
        default=None,
        description="Tasks with choices: compare their likelihoods (the default), or let the model "
        "generate a letter.",
    )
    thinking: bool | None = Field(
        default=None,
        description="Tasks: let the model think before it answers, or not; by default as its chat "
        "template does.",
    )
    system: str | None = Field(
        default=None,
        description="Tasks: system message: a text, a structured prompt by name, or a .md file.",
    )
    chat: bool | None = Field(
        default=None,
        description="Tasks: use the model's chat template; by default where answers are generated "
        "and it has one.",
    )
    proxy: str | None = Field(
        default=None, description="over-optimisation: the reward that chooses the best answer."
    )
    gold: str | None = Field(
        default=None,
        description="over-optimisation: the reward that measures what is wanted.",
    )
    samples: int | None = Field(
        default=None,
        ge=2,
        description="over-optimisation: answers to each prompt; by default 16.",
    )
    prior_ties: float | None = Field(
        default=None,
        ge=0,
        description="elo: ties added to every two models that have met, which keeps the rating of "
        "an undefeated model finite; by default 0.",
    )


_KEY_ENV = Field(default=None, description="Environment variable with the API key of the judge.")
_OF_JUDGE = ("model", "language", "reason", "max_tokens", "timeout_s", "retries", "concurrency")
_FIELDS: dict[str, Any] = {"judge_key_env": (str | None, _KEY_ENV)}
for _name in _OF_JUDGE:
    _info = JudgeConfig.model_fields[_name]
    _type: Any = _info.annotation
    _FIELDS[f"judge_{_name}"] = (_type | None, Field(default=None, description=_info.description))
JudgeOptions = create_model("JudgeOptions", **_FIELDS)
"""The fields of `JudgeConfig` with a prefix, and where the API key is."""

MEASURED = FlagGroup(
    EvalOptions,
    *EvalOptions.model_fields,
    metavars={
        "against": "MODEL",
        "judge": "URL|reward:FOLDER|rule:NAME",
        "proxy": METAVAR,
        "gold": METAVAR,
        "choices": "likelihood|generated",
        "system": "TEXT|NAME|FILE",
    },
    flags={"thinking": "--thinking/--no-thinking", "chat": "--chat/--no-chat"},
)
JUDGED = FlagGroup(
    JudgeOptions,
    *JudgeOptions.model_fields,
    flags={"judge_reason": "--judge-reason/--no-judge-reason"},
    metavars={"judge_key_env": "VARIABLE", "judge_language": "en|zh"},
)

OptionalModel = Annotated[
    str | None, typer.Argument(help="smollm2, a checkpoint folder, a .gguf file, or hf:org/name.")
]
DataFile = Annotated[
    Path | None,
    typer.Argument(
        callback=home_path,
        help="A .json or .jsonl file of conversations, or of prompts (win-rate, "
        "over-optimisation), or of judged pairs (elo); for perplexity, a file of texts: plain "
        "text, Markdown, JSONL, Parquet.",
    ),
]
SameFile = Annotated[
    Path | None, typer.Option("--data", callback=home_path, help="The same as DATA.")
]
TaskFlag = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="The loss on responses and recall (answers), the perplexity of texts, how often "
        "answers are better than a reference's (win-rate), ratings of several models (elo), or "
        "gold against proxy reward of best-of-n (over-optimisation); a task of items: gsm8k, "
        "humaneval, xquad-en, xquad-zh, cmrc, wmt22-zh-en, wikitext2, or FILE.yaml; or "
        "lm-eval:NAME.",
    ),
]
PairsFile = Annotated[
    Path | None,
    typer.Option(
        callback=home_path,
        help="win-rate: a new .jsonl file of the judged pairs. Tasks: the folder of responses and "
        "scores, with which an interrupted run resumes.",
    ),
]
ReferencesFile = Annotated[
    Path | None,
    typer.Option(callback=home_path, help="wmt22-zh-en: the references of the lines of the data."),
]
ShotsFile = Annotated[
    Path | None,
    typer.Option(
        callback=home_path,
        help="Tasks: file of the examples; by default the first rows of the data, which are then "
        "not evaluated.",
    ),
]
IncludeFolder = Annotated[
    Path | None,
    typer.Option(callback=home_path, help="lm-eval: folder with task files of your own."),
]
Compared = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        "--compare",
        metavar="A B",
        help="Compare two evaluations (folders of --output) item by item, with significance.",
    ),
]
FigureFile = Annotated[
    Path | None,
    typer.Option(callback=home_path, help="over-optimisation: a new .svg file of the curves."),
]
CacheFile = Annotated[
    Path | None,
    typer.Option(
        callback=home_path,
        help="File of the judge's replies so far, with which an interrupted run resumes; by "
        "default one for each address, in Easyllm's cache folder.",
    ),
]

_SAMPLED = ("limit", "max_tokens", "temperature", "seed")
_READ: dict[Task, tuple[str, ...]] = {
    Task.answers: ("max_tokens",),
    Task.perplexity: ("context", "stride", "text_key"),
    Task.win_rate: (
        *("against", "judge", "output", "judge_cache"),
        *_SAMPLED,
        *JudgeOptions.model_fields,
    ),
    Task.elo: ("seed", "prior_ties"),
    Task.over_optimisation: ("proxy", "gold", "samples", "figure", *_SAMPLED),
    Task.items: (
        *("shots", "choices", "thinking", "chat", "output", "references", "shots_data"),
        "system",
        *_SAMPLED,
    ),
    Task.lm_eval: ("limit", "shots", "chat", "output", "include"),
}
"""The options that each task reads; others are refused."""


def find_task(name: str) -> Task:
    """Returns the kind of a task by its name."""
    if name.startswith("lm-eval:"):
        return Task.lm_eval
    return next((task for task in NAMED_TASKS if task.value == name), Task.items)


def options_of(task: Task, *groups: JsonMapping, **paths: Any) -> dict[str, Any]:
    """Returns the options that are set.

    Raises:
        ConfigError: the task does not read one of them.
    """
    every = {name: value for group in (*groups, paths) for name, value in group.items()}
    given = {name: value for name, value in every.items() if value is not None}
    for name in given:
        if name not in _READ[task]:
            tasks = [each.value for each, names in _READ.items() if name in names]
            known = f"{', '.join(tasks[:-1])} and {tasks[-1]}" if tasks[1:] else tasks[0]
            named = [each.value for each in NAMED_TASKS if name in _READ[each]]
            raise ConfigError(
                f"--{name.replace('_', '-')} concerns {known}, not {task.value}; leave it out, or "
                f"add --task {named[-1] if named else 'NAME'}"
            )
    return given


__all__ = [
    "JUDGED",
    "MEASURED",
    "CacheFile",
    "Compared",
    "DataFile",
    "FigureFile",
    "IncludeFolder",
    "OptionalModel",
    "PairsFile",
    "ReferencesFile",
    "SameFile",
    "ShotsFile",
    "Task",
    "TaskFlag",
    "find_task",
    "options_of",
]
