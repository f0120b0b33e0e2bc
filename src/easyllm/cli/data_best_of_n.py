"""The `easyllm data best-of-n` command."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.adapter import AdapterFolder
from easyllm.cli.models import Model
from easyllm.cli.options import Values, with_flags
from easyllm.cli.output import JsonFlag, home_path, print_json
from easyllm.cli.sampling import LOADING, SAMPLING
from easyllm.cli.scorers import METAVAR, load_scorer

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject
    from easyllm.evaluate.answer_store import AnswerStore
    from easyllm.evaluate.best_of_n import BestOfN
    from easyllm.evaluate.prompt_rows import PromptRow


Reward = Annotated[
    str,
    typer.Option(
        metavar=METAVAR,
        help="What scores the answers: a trained reward model, or a rule such as "
        "exact, contains, digits, code, mine.py:score or length,target=40.",
    ),
]


class Rows(StrEnum):
    """What is written."""

    sft = "sft"
    pairs = "pairs"


@with_flags
def best_of_n(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Argument(callback=home_path, help="A .json or .jsonl file of rows with prompts."),
    ],
    output: Annotated[Path, typer.Argument(callback=home_path, help="A new .jsonl file.")],
    *,
    reward: Reward,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=2, help="Answers to each prompt.")
    ] = 8,
    rows: Annotated[
        Rows,
        typer.Option(help="The best answers to fine-tune on (sft), or best and worst (pairs)."),
    ] = Rows.sft,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts to read; by default all of them.")
    ] = None,
    sampling: Annotated[
        Values,
        SAMPLING.only("temperature", "top_p", "seed", "max_tokens").starting(
            seed=0, max_tokens=256
        ),
    ],
    loading: Annotated[Values, LOADING.only("dtype", "quantize", "deterministic")],
    adapter: AdapterFolder = None,
    json_output: JsonFlag = False,
) -> None:
    """Sample several answers to each prompt, and write the best, or the best and worst as pairs.

    The same seed gives the same rows. Pairs are left out where all scores are equal. The answers so
    far are in OUTPUT.part: an interrupted command continues when it is repeated.

    [bold]Examples[/bold]

        easyllm data best-of-n smollm2 prompts.jsonl best.jsonl --reward reward:runs/rm-en/adapter

        easyllm data best-of-n smollm2 sums.jsonl pairs.jsonl --reward rule:exact --rows pairs -n 16
    """
    from easyllm.cli.evaluate_preferences import answers_of
    from easyllm.core.atomic import write_atomic
    from easyllm.core.errors import DataError
    from easyllm.evaluate.best_of_n import best_of_n as choose
    from easyllm.evaluate.prompt_rows import read_prompts

    _check(output, sampling)
    scorer = load_scorer(reward)
    asked = read_prompts(prompts, limit=limit)
    loads = {"adapter": adapter, **loading}
    given = {name: value for name, value in sampling.items() if value is not None}
    store = _store(output, model, asked, {**loads, **given, "samples": samples})
    groups = answers_of(model, asked, loads, given, n=samples, store=store)
    result = choose(groups, scorer, form=rows.value)
    if not result.rows:
        raise DataError(
            f"all {samples} answers of each of the {result.prompts} prompts have the same score, so"
            " there are no pairs; raise --samples or --temperature, or choose another --reward"
        )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows]
    write_atomic(output, "".join(lines))
    store.remove()
    if json_output:
        print_json(result.as_dict())
    else:
        sys.stdout.write(f"{output}  {_summary(result, rows)}")


def _store(
    output: Path, model: str, prompts: "list[PromptRow]", options: "JsonObject"
) -> "AnswerStore":
    """Returns the answers of an interrupted command, next to the output, and says if there are any.

    Raises:
        OutputError: they are those of other options.
    """
    from easyllm.core.progress import console
    from easyllm.evaluate.answer_store import AnswerStore, identity_of
    from easyllm.models.adapted import split_adapter
    from easyllm.models.sources import locate

    asked = [[prompt.messages, prompt.tools] for prompt in prompts]
    values = {"model": model, "prompts": asked, **{k: str(v) for k, v in options.items()}}
    base, adapter = split_adapter(model, options["adapter"])
    identity = identity_of(values, locate(base), *([] if adapter is None else [adapter]))
    store = AnswerStore(Path(f"{output}.part"), identity)
    if store.num_prompts:
        console().print(
            f"continuing: the answers to {store.num_prompts:,} of {len(prompts):,} prompts are in "
            f"{store.path}",
            soft_wrap=True,
        )
    return store


def _check(output: Path, sampling: Values) -> None:
    """Checks, before any work, that answers can differ and the file can be written."""
    from easyllm.core.atomic import check_writable
    from easyllm.core.errors import ConfigError, OutputError

    if output.suffix != ".jsonl":
        raise OutputError(f"{str(output)!r} does not end in .jsonl; name a .jsonl file")
    if output.exists():
        raise OutputError(f"{str(output)!r} already exists; name a new file")
    if sampling["temperature"] == 0:
        raise ConfigError("temperature=0 gives the same answer every time; set it above 0")
    check_writable(output)


def _summary(result: "BestOfN", rows: Rows) -> str:
    """Returns two lines about what was written."""
    kind = "pairs" if rows is Rows.pairs else "conversations"
    left_out = f", {result.equal:,} prompts left out (equal scores)" if result.equal else ""
    return (
        f"{len(result.rows):,} {kind}{left_out}\n"
        f"mean score {result.mean_score:.4g} of all {result.answers:,} answers, "
        f"{result.best_score:.4g} of the best; {result.truncated:,} reached the maximum length\n"
    )
