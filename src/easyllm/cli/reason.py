"""The `easyllm reason` command."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import BaseModel, Field

from easyllm.cli.adapter import AdapterFolder
from easyllm.cli.options import FlagGroup, Values, checked_flags, with_flags
from easyllm.cli.output import JsonFlag, home_path, print_json, print_pairs
from easyllm.cli.sampling import LOADING
from easyllm.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from easyllm.core.json_types import JsonObject
    from easyllm.prompt.ask import ModelAsker
    from easyllm.prompt.reasoning import Example, Method, Reasoned


class ReasonOptions(BaseModel):
    """How a model reasons."""

    method: Literal["direct", "few-shot", "zero-shot", "least-to-most", "tree"] = Field(
        default="zero-shot", description="How: see above; direct asks for the answer alone."
    )
    samples: int = Field(
        default=1, ge=1, le=128, description="Replies whose most frequent answer counts (vote)."
    )
    temperature: float = Field(
        default=0.7, ge=0, le=10, description="Of the samples, and of a tree's proposals."
    )
    kind: Literal["number", "choice", "line", "text"] = Field(
        default="number", description="What an answer is: a number, a letter, a line, all."
    )
    language: Literal["en", "zh"] = Field(default="en", description="Language of the phrases.")
    breadth: int = Field(default=2, ge=1, le=16, description="tree: states that are kept.")
    depth: int = Field(default=4, ge=1, le=32, description="tree: steps.")
    max_tokens: int = Field(default=256, ge=1, description="Tokens of each reply.")
    seed: int = Field(default=0, description="Seed of the samples.")
    limit: int | None = Field(default=None, ge=1, description="Questions of the file to read.")
    select: int | None = Field(
        default=None,
        ge=1,
        description="few-shot: choose so many examples, those that raise accuracy on the first "
        "questions of the file most.",
    )
    select_on: int = Field(
        default=16, ge=2, description="few-shot: questions on which examples are chosen."
    )
    system: str = Field(
        default="",
        description="The system message: a text, a structured prompt by name, or a .md file.",
    )


REASON = FlagGroup(
    ReasonOptions,
    *ReasonOptions.model_fields,
    metavars={
        "method": "direct|few-shot|zero-shot|least-to-most|tree",
        "kind": "number|choice|line|text",
        "language": "en|zh",
        "system": "TEXT|NAME|FILE",
    },
)


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command("reason")(reason_about)


@with_flags
def reason_about(
    model: Annotated[
        str, typer.Argument(help="smollm2, a checkpoint folder, a .gguf file, or hf:org/name.")
    ],
    question: Annotated[str | None, typer.Argument(help="The question.")] = None,
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            callback=home_path, help="Questions with answers: rows with `question` and `answer`."
        ),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            callback=home_path,
            help="few-shot: rows with `question`, `answer` and `steps` (or steps in the answer).",
        ),
    ] = None,
    options: Annotated[Values, REASON],
    loading: Annotated[Values, LOADING.only("dtype", "quantize")],
    adapter: AdapterFolder = None,
    json_output: JsonFlag = False,
) -> None:
    """Let a model reason before it answers: step by step, by vote, in parts, as a tree.

    few-shot shows examples with their steps; zero-shot says "Let's think step by step" and then
    asks for the answer; --samples takes the most frequent answer of several replies; least-to-most
    divides the question; tree proposes, values and prunes steps. With --data, accuracy with its
    interval. The tokens that were spent are reported.

    [bold]Examples[/bold]

        easyllm reason smollm2 "Tom has 3 boxes with 4 pens each. How many pens has he?"

        easyllm reason smollm2 "What is 17 * 6?" --samples 8 --json

        easyllm reason smollm2 --data gsm8k.jsonl --method few-shot --examples train.jsonl
    """
    from easyllm.cli.sampling import load_llm
    from easyllm.prompt.ask import ModelAsker
    from easyllm.prompt.library import system_message
    from easyllm.prompt.reasoning import check_method

    given = checked_flags(ReasonOptions, options, REASON, source="options of reasoning")
    if (question is None) == (data is None):
        raise ConfigError("reason needs one question, or --data FILE with several; give one")
    shown = _examples(examples, given.kind) if examples is not None else []
    if given.select is not None and (not shown or data is None):
        raise ConfigError("--select chooses from --examples by --data; give both")
    rows, tuning = _divided(_rows(data, given) if data is not None else [], given)
    questions = [question] if question is not None else [asked for asked, _ in rows]
    check_method(given.method, questions, examples=len(shown), samples=given.samples)
    system = system_message(given.system) if given.system else ""
    llm = load_llm(model, quiet=json_output, adapter=adapter, **loading)
    ask = ModelAsker(
        llm,
        max_tokens=given.max_tokens,
        seed=given.seed,
        chat=llm.tokenizer.chat_template is not None,
        system=system,
    )
    history = None
    if given.select is not None:
        shown, history = _selected(ask, shown, tuning, given)
    found = _reason(ask, questions, shown, given)
    result = _result(found, [right for _, right in rows], given)
    result |= {"model": model, "examples": len(shown), "generated_tokens": ask.tokens}
    if history is not None:
        result["selection"] = history
    _print(result, found, json_output=json_output)


def _divided(
    rows: list[tuple[str, str]], given: ReasonOptions
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Returns the questions to answer, and those that examples are selected by.

    Raises:
        ConfigError: none are left to answer.
    """
    from easyllm.core.errors import ConfigError

    if given.select is None:
        return rows, []
    rows, tuning = rows[given.select_on :], rows[: given.select_on]
    if not rows:
        raise ConfigError(
            f"--select-on {given.select_on} leaves none of the {len(tuning)} questions of --data; "
            "lower it"
        )
    return rows, tuning


def _reason(
    ask: "ModelAsker", questions: list[str], examples: "list[Example]", given: ReasonOptions
) -> "list[Reasoned]":
    from easyllm.prompt.reasoning import reason

    return reason(
        ask,
        questions,
        given.method,
        kind=given.kind,
        examples=examples,
        samples=given.samples,
        temperature=given.temperature,
        language=given.language,
        breadth=given.breadth,
        depth=given.depth,
    )


def _selected(
    ask: "ModelAsker",
    pool: "list[Example]",
    tuning: list[tuple[str, str]],
    given: ReasonOptions,
) -> "tuple[list[Example], list[float]]":
    """Returns the examples that raise accuracy on some questions most, and the accuracies."""
    from easyllm.prompt.reasoning import reason, select_examples

    def accuracy(examples: "Sequence[Example]") -> float:
        method: Method = "few-shot" if examples else "zero-shot"
        found = reason(ask, [q for q, _ in tuning], method, kind=given.kind, examples=examples)
        return sum(_right(f, r) for f, (_, r) in zip(found, tuning, strict=True)) / len(tuning)

    assert given.select is not None, "asked for"
    return select_examples(pool, accuracy, count=given.select)


def _right(found: "Reasoned", right: str) -> bool:
    from easyllm.prompt.reasoning import vote_key

    return found.answer is not None and vote_key(found.answer) == vote_key(right)


def _rows(path: Path, given: ReasonOptions) -> list[tuple[str, str]]:
    """Returns the questions of a file with their answers."""
    from itertools import islice

    from easyllm.core.errors import DataError
    from easyllm.examples.data_file import read_rows
    from easyllm.prompt.extract import extract

    found = []
    for row in islice(read_rows(path), given.limit):
        question, answer = row.values.get("question"), row.values.get("answer")
        right = extract(given.kind, str(answer)) if answer is not None else None
        if not isinstance(question, str) or right is None:
            raise DataError(
                f"{row.location} has no `question` with an `answer` that is a {given.kind} (keys: "
                f"{', '.join(row.values)}); fix the row, or set --kind"
            )
        found.append((question, right))
    return found


def _examples(path: Path, kind: Literal["number", "choice", "line", "text"]) -> "list[Example]":
    """Returns the examples of a file; an answer with steps ends in `#### answer`."""
    from easyllm.core.errors import DataError
    from easyllm.examples.data_file import read_rows
    from easyllm.prompt.extract import extract
    from easyllm.prompt.reasoning import Example

    found = []
    for row in read_rows(path):
        question, answer = row.values.get("question"), str(row.values.get("answer", ""))
        right = extract(kind, answer)
        if not isinstance(question, str) or right is None:
            raise DataError(f"{row.location} has no `question` with an `answer`; fix the row")
        steps = str(row.values.get("steps") or answer.partition("####")[0].strip())
        found.append(Example(question, "" if steps == answer.strip() else steps, right))
    return found


def _result(found: "list[Reasoned]", rights: list[str], given: ReasonOptions) -> "JsonObject":
    from dataclasses import asdict

    result: JsonObject = {
        "method": given.method,
        "samples": given.samples,
        "answers": [asdict(each) for each in found],
        "unparsed": sum(each.answer is None for each in found),
        "truncated": sum(each.truncated for each in found),
    }
    if rights:
        from easyllm.evaluate.metric import Outcome, mean_metric, score, table

        metric = mean_metric("accuracy", "tests", lambda outcome: float(outcome.passed))
        passed = [_right(f, r) for f, r in zip(found, rights, strict=True)]
        result["scores"] = [
            asdict(score(metric, table(metric, [Outcome(passed=each) for each in passed])))
        ]
        for answer, right in zip(result["answers"], rights, strict=True):
            answer["right"] = right
    return result


def _print(result: "JsonObject", found: "list[Reasoned]", *, json_output: bool) -> None:
    if json_output:
        print_json(result)
        return
    if "scores" not in result:
        (only,) = found
        sys.stdout.write(f"{only.text}\n\n")
        figures: JsonObject = {"answer": only.answer if only.answer is not None else "none found"}
        if only.agreement is not None:
            figures["agreement"] = f"{only.agreement:.0%} of {only.votes}"
    else:
        score = result["scores"][0]
        figures = {"accuracy": f"{score['value']:.4f} ± {score['standard_error'] or 0:.4f}"}
        if score["low"] is not None:
            figures["95% interval"] = f"{score['low']:.4f} … {score['high']:.4f}"
        figures |= {"questions": len(found), "unparsed": result["unparsed"]}
    figures |= {"truncated": result["truncated"], "tokens": result["generated_tokens"]}
    print_pairs(figures)
