"""Evaluation tasks: what is asked, how the answer is read, how it is scored.

A task is a small YAML or JSON file. The tasks in the folder `tasks` are such files too, and are
found by name; they contain no data, which the user points to.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from easyllm.core.config import Config, validate
from easyllm.core.errors import ConfigError, SourceError, suggest
from easyllm.core.yaml_text import read_yaml
from easyllm.evaluate.likelihood_metrics import likelihood_metrics
from easyllm.evaluate.metric import Metric, find_metrics
from easyllm.evaluate.text_metrics import Language, text_metrics
from easyllm.prompt.extract import AnswerKind

FOLDER = Path(__file__).with_name("tasks")
FIELD = re.compile(r"\{\{\s*([\w.-]+)\s*\}\}")
"""A field of a row in a prompt: `{{question}}`."""
TaskKind = Literal["generate", "choice", "text"]
Reader = Literal["rows", "squad", "lines", "articles"]


class TaskConfig(Config):
    """An evaluation task."""

    name: str = Field(description="Name in results.")
    kind: TaskKind = Field(
        description="`generate`: the model writes an answer; `choice`: it chooses one of several; "
        "`text`: the probability of texts."
    )
    reader: Reader = Field(
        default="rows",
        description="Form of the data file: `rows` (JSON or JSON lines), `squad` (SQuAD, XQuAD, "
        "CMRC), `lines` (a text per line, references in a second file), `articles` (WikiText).",
    )
    language: Language = Field(
        default="en", description="Language of the references, for BLEU and ROUGE: `en` or `zh`."
    )
    prompt: str = Field(
        default="", description="What the model is asked; `{{name}}` is a field of the row."
    )
    system: str = Field(default="", description="System message before the prompt.")
    reference: str = Field(
        default="{{answer}}",
        description="The right answer; a field that is a list gives several.",
    )
    shot: str = Field(
        default="", description="Answer of an example (shot); by default the first reference."
    )
    choices: str = Field(default="choices", description="choice: field with the list of choices.")
    gold: str = Field(
        default="answer",
        description="choice: field with the right choice: its number from 0, letter or text.",
    )
    delimiter: str = Field(
        default=" ", description="choice: text between the prompt and a choice; empty in Chinese."
    )
    generated_prompt: str = Field(
        default="{{prompt}}\n{{options}}\nAnswer with the letter of the right choice only.",
        description="choice: prompt if the letter is generated; `{{options}}` are the choices with "
        "letters, `{{prompt}}` is the prompt.",
    )
    extract: AnswerKind = Field(
        default="text", description="What is read from a response: text, line, number, code."
    )
    program: str = Field(
        default="", description="Python program that tests an answer, `{{response}}`."
    )
    metrics: tuple[str, ...] = Field(description="Names of the metrics.")
    shots: NonNegativeInt = Field(default=0, description="Number of examples before the question.")
    max_tokens: PositiveInt = Field(default=256, description="Tokens of a response.")
    stop: tuple[str, ...] = Field(
        default=(), description="Stop strings of prompts without a chat template."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "TaskConfig":
        if self.kind != "text" and not self.prompt:
            raise ValueError("prompt is missing; write what the model is asked")
        if not self.metrics:
            raise ValueError("metrics is empty; name at least one")
        if self.kind == "choice" and self.extract != "text":
            raise ValueError("extract is for tasks of kind generate; leave it out")
        if (self.reader == "articles") != (self.kind == "text"):
            raise ValueError("reader articles and kind text go together")
        if bool(self.program) != ("pass@1" in self.metrics):
            raise ValueError("program and the metric pass@1 go together")
        self._check_braces()
        return self

    def _check_braces(self) -> None:
        """Refuses what would reach the model as it is written, for example Jinja's filters."""
        for key in ("prompt", "system", "reference", "shot", "generated_prompt"):
            rest = FIELD.sub("", getattr(self, key))
            for left in ("{{", "{%"):
                if left in rest:
                    found = rest[rest.index(left) :].splitlines()[0][:40]
                    raise ValueError(
                        f"{key} has {found!r}, which is not a field; write a field of the row as "
                        "{{name}}, and nothing else between the braces"
                    )
        if self.kind != "text" and not FIELD.search(self.prompt):
            raise ValueError(
                "prompt names no field, so every item would be the same; add one, such as "
                "{{question}}"
            )

    @property
    def fields(self) -> list[str]:
        """The fields of a row that the task names, in order."""
        texts = [self.prompt, self.system, self.shot if self.shots else "", self.program]
        if self.kind == "choice":
            texts.append(self.generated_prompt)
        elif self.kind == "generate" and not self.program:
            texts.append(self.reference)
        names = [name for text in texts for name in FIELD.findall(text)]
        names += [self.choices, self.gold] if self.kind == "choice" else []
        made = {"options", "prompt"} if self.kind == "choice" else {"response"}
        if self.kind == "choice" and "prompt" in FIELD.findall(self.prompt):
            made = {"options"}
        return list(dict.fromkeys(name for name in names if name not in made))

    def metrics_for(self, *, likelihood: bool) -> list[Metric]:
        """Returns the task's metrics, those of likelihoods only where there are any.

        Raises:
            ConfigError: a metric is not known, or does not fit the task.
        """
        every = {**text_metrics(self.language), **likelihood_metrics()}
        found = find_metrics(self.metrics, every)
        fitting = {
            "generate": {"text", "tests"},
            "choice": {"choices", "likelihoods"},
            "text": {"nats"},
        }[self.kind]
        for metric in found:
            if metric.needs not in fitting:
                names = ", ".join(name for name, each in every.items() if each.needs in fitting)
                raise ConfigError(
                    f"metric {metric.name!r} does not fit task {self.name!r} of kind {self.kind}; "
                    f"metrics that do: {names}"
                )
        if self.kind == "choice" and not likelihood:
            found = [metric for metric in found if metric.needs == "choices"]
            if not found:
                raise ConfigError(
                    f"the metrics of task {self.name!r} need likelihoods; add accuracy, or leave "
                    "out --choices generated"
                )
        return found


def load_task(source: str) -> TaskConfig:
    """Returns a task by name, or from a `.yaml` or `.json` file.

    Raises:
        SourceError: there is no such task.
        ConfigError: the file is invalid.
    """
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml", ".json"):
        values = read_yaml(path, what="task")  # JSON is YAML
        return validate(TaskConfig, {"name": path.stem, **values}, source=str(path))
    names = task_names()
    if source not in names:
        raise SourceError(
            f"task {source!r} is not known{suggest(source, names)}; there are {', '.join(names)}, "
            "lm-eval:NAME, and files such as mine.yaml"
        )
    return validate(TaskConfig, read_yaml(FOLDER / f"{source}.yaml"), source=f"task {source}")


def task_names() -> list[str]:
    """Returns the names of the tasks in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


__all__ = ["FIELD", "TaskConfig", "load_task", "task_names"]
