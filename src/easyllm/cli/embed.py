"""The `easyllm embed` commands: training word and sentence vectors, and searching with them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from easyllm.cli.options import FlagGroup, Values, checked_flags, with_flags
from easyllm.cli.output import JsonFlag, Overrides, home_path, print_json, print_table
from easyllm.cli.train import train as train_recipe
from easyllm.core.errors import ConfigError
from easyllm.embed.word_config import SkipGramConfig

embed_app = typer.Typer(
    no_args_is_help=True,
    help="""Train word and sentence embeddings, and search with them.

    [bold]Examples[/bold]

        easyllm embed train embed-facts output=runs/embed

        easyllm embed search e5-small texts.txt "a question"

        easyllm embed words corpus.txt runs/words
    """,
)

TRAINING = FlagGroup(SkipGramConfig, *SkipGramConfig.model_fields)


def register(app: typer.Typer) -> None:
    """Adds the `embed` command group to `app`."""
    app.add_typer(embed_app, name="embed")


@embed_app.command("train")
def train(
    recipe: Annotated[
        str,
        typer.Argument(help="A YAML file with `objective: {kind: contrastive}`, or embed-facts."),
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate and print the plan; train nothing.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    r"""Train sentence embeddings on pairs of texts, from any model: `easyllm train`, checked.

    Rows are {"query": ..., "positive": ...}, optionally with a list of "negatives".

    [bold]Examples[/bold]

        easyllm embed train embed-facts output=runs/embed

        easyllm embed train embed-facts 'data.train=\[pairs.jsonl]' model=my-model --dry-run
    """
    from easyllm.pipeline.recipe import find_recipe, load_train_recipe

    config = load_train_recipe(find_recipe(recipe), overrides or [])
    if config.objective.kind != "contrastive":
        raise ConfigError(
            f"recipe {recipe!r} has the objective {config.objective.kind!r}, expected contrastive; "
            "run easyllm train for others"
        )
    train_recipe(recipe, overrides, dry_run=dry_run, json_output=json_output)


@embed_app.command("search")
def search(
    source: Annotated[
        str, typer.Argument(help="Embedding model, or a folder of `easyllm embed words`.")
    ],
    texts: Annotated[
        Path | None,
        typer.Argument(callback=home_path, help="File with one text per line; none for words."),
    ] = None,
    query: Annotated[
        str | None, typer.Argument(help="The text to search for; none for words.")
    ] = None,
    *,
    words: Annotated[
        str | None,
        typer.Option(help="Words to add and subtract: 'king - man + woman'.", metavar="WORDS"),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="Vector of a text of a decoder: mean (by default) or last."),
    ] = None,
    count: Annotated[int, typer.Option("--k", min=1, help="Number of results.")] = 10,
    json_output: JsonFlag = False,
) -> None:
    """Find the texts, or the words, that are nearest to a query.

    [bold]Examples[/bold]

        easyllm embed search e5-small texts.txt "Which tea is not fermented?"

        easyllm embed search runs/embed/merged texts.txt "a question" --pooling mean --json

        easyllm embed search runs/words --words "paris - france + italy"
    """
    if words is not None:
        if texts is not None:
            raise ConfigError("--words searches word vectors; leave out the file of texts")
        found = _words_near(source, words, count)
    elif texts is None or query is None:
        raise ConfigError("search needs a file of texts and a query, or --words")
    else:
        found = _texts_near(source, texts, query, pooling, count)
    if json_output:
        print_json([{"text": text, "cosine": cosine} for text, cosine in found])
        return
    print_table("", ("cosine", "text"), [(f"{cosine:.3f}", text) for text, cosine in found])


def _words_near(source: str, expression: str, count: int) -> list[tuple[str, float]]:
    """Returns the neighbours of a sum of words."""
    from easyllm.core.paths import expanded
    from easyllm.embed.word_vectors import WordVectors

    plus, minus = list[str](), list[str]()
    side = plus
    for token in expression.split():
        if token in "+-":
            side = plus if token == "+" else minus
        else:
            side.append(token.casefold())
            side = plus
    return WordVectors.load(expanded(source)).neighbours(plus, minus, count)


def _texts_near(
    source: str, file: Path, query: str, pooling: str | None, count: int
) -> list[tuple[str, float]]:
    """Returns the nearest lines of a file.

    Raises:
        ConfigError: the pooling is not known, or the file contains no text.
    """
    import numpy as np

    from easyllm.embed.embedder import embed_with_progress, load_embedder
    from easyllm.retrieval.documents import read_content

    if pooling not in (None, "mean", "last", "first"):
        raise ConfigError(f"--pooling {pooling!r} is not known; use mean, last or first")
    lines = read_content(file).decode("utf-8", "replace").splitlines()
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not texts:
        raise ConfigError(f"{file} contains no text; give one text per line")
    embedder = load_embedder(source, pooling=pooling)  # type: ignore[arg-type]
    scores = embed_with_progress(embedder, texts) @ embedder.embed([query], "query")[0]
    return [(texts[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:count]]


@embed_app.command("words")
@with_flags
def words(
    text: Annotated[
        Path, typer.Argument(callback=home_path, help="Text to train on; a line is one text.")
    ],
    out: Annotated[Path, typer.Argument(callback=home_path, help="Folder of the vectors.")],
    *,
    training: Annotated[Values, TRAINING],
    json_output: JsonFlag = False,
) -> None:
    """Train word vectors by skip-gram with negative sampling (word2vec).

    [bold]Examples[/bold]

        easyllm embed words corpus.txt runs/words

        easyllm embed words corpus.txt runs/words --dim 50 --epochs 10 --json
    """
    from easyllm.core.atomic import check_output_free
    from easyllm.embed.skip_gram import train_word_vectors
    from easyllm.embed.word_vectors import words_of
    from easyllm.retrieval.documents import read_content

    check_output_free(out)
    config = checked_flags(SkipGramConfig, training, TRAINING, source="options of embed words")
    lines = read_content(text).decode("utf-8", "replace").splitlines()
    vectors = train_word_vectors((words_of(line) for line in lines), config)
    vectors.save(out)
    figures = {"words": len(vectors.words), "dim": vectors.vectors.shape[1], "output": str(out)}
    if json_output:
        print_json(figures)
    else:
        sys.stdout.write(f"{figures['words']:,} words, {figures['dim']} dimensions: {out}\n")
