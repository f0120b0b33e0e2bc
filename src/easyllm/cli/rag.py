"""The `easyllm rag` commands: answers from a user's own documents."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.options import FlagGroup, Values, checked_flags, with_flags
from easyllm.cli.output import JsonFlag, home_path, print_json, print_pairs, print_table
from easyllm.cli.serve import Port, start
from easyllm.core.json_types import JsonMapping
from easyllm.retrieval.ask_config import AskConfig
from easyllm.retrieval.chunk import ChunkConfig

if TYPE_CHECKING:
    from easyllm.retrieval.question_files import QuestionSet
    from easyllm.retrieval.search import Retriever
    from easyllm.serve.documents import Documents

rag_app = typer.Typer(
    no_args_is_help=True,
    help="""Answer questions from documents: index them, search, cite.

    [bold]Examples[/bold]

        easyllm rag index docs/ runs/docs-index

        easyllm rag ask runs/docs-index "How do I resume a run?"

        easyllm rag eval squad.json --json
    """,
)
CHUNKS = FlagGroup(ChunkConfig, "max_tokens", flags={"max_tokens": "--chunk-tokens"})
IndexFolder = Annotated[Path, typer.Argument(callback=home_path, help="Folder of the index.")]
EmbedderName = Annotated[
    str | None,
    typer.Option(
        "--embedder",
        help="Embedding model: e5-small (by default), minilm, a folder, or any model.",
        metavar="MODEL",
    ),
]
FINDING = FlagGroup(
    AskConfig,
    "passages",
    "mode",
    "rewrite",
    "hyde",
    "sub_questions",
    "rerank",
    "expand",
    "compress",
)
SERVED = FINDING.only("passages", "mode", "expand", "compress")
ANSWER = FlagGroup(AskConfig, "prompt", "max_tokens")
DEFAULT_EMBEDDER = "e5-small"


def register(app: typer.Typer) -> None:
    """Adds the `rag` command group to `app`."""
    app.add_typer(rag_app, name="rag")


@rag_app.command("index")
@with_flags
def index(
    documents: Annotated[
        Path,
        typer.Argument(
            callback=home_path,
            metavar="DIR",
            help="Folder with text, Markdown, HTML and PDF files; or one file.",
        ),
    ],
    out: Annotated[Path, typer.Argument(callback=home_path, help="Folder of the index.")],
    *,
    embedder: EmbedderName = None,
    chunks: Annotated[Values, CHUNKS.starting(max_tokens=None)],
    json_output: JsonFlag = False,
) -> None:
    """Index documents, or bring an index up to date: only changed documents are embedded.

    A build that is interrupted leaves a usable index, and continues when it is started again.
    Files that cannot be read are reported and left out.

    [bold]Examples[/bold]

        easyllm rag index docs/ runs/docs-index

        easyllm rag index docs/ runs/docs-index --chunk-tokens 128 --embedder minilm

        easyllm rag index manual.pdf runs/manual-index --json
    """
    from easyllm.embed.embedder import load_embedder
    from easyllm.retrieval.build import build_index, check_build
    from easyllm.retrieval.index import INDEX_FILE, read_state

    given = {field: value for field, value in chunks.items() if value is not None}
    config = checked_flags(ChunkConfig, given, CHUNKS) if given else None
    check_build(documents, out, config)  # a mistake is reported before a model is loaded
    known = (out / INDEX_FILE).is_file()
    name = embedder or (read_state(out).embedder["name"] if known else DEFAULT_EMBEDDER)
    report = build_index(documents, out, load_embedder(name), config)
    for reason in report.refused.values():
        sys.stderr.write(f"left out: {reason}\n")
    if json_output:
        print_json(report.as_dict())
        return
    print_pairs(
        {
            "documents": f"{report.added} added, {report.changed} changed, "
            f"{report.removed} removed, {report.unchanged} unchanged",
            "left out": f"{len(report.refused)} unreadable, {report.ignored} of other kinds",
            "chunks": f"{report.chunks:,}",
        }
    )


@rag_app.command("ask")
@with_flags
def ask(
    folder: IndexFolder,
    question: Annotated[str, typer.Argument(help="The question.")],
    *,
    model: Annotated[str, typer.Option(help="Model that answers.", metavar="MODEL")] = "smollm2",
    finding: Annotated[Values, FINDING],
    answer: Annotated[Values, ANSWER],
    embedder: EmbedderName = None,
    json_output: JsonFlag = False,
) -> None:
    """Answer a question from an index, with citations that are compared with the sources.

    Each sentence of the answer is compared with the sentences of the passages by code, not by a
    model: a document cannot influence the check.

    [bold]Examples[/bold]

        easyllm rag ask runs/docs-index "How do I resume a run?"

        easyllm rag ask runs/docs-index "Who wrote it, and when?" --sub-questions 2 --rerank 10

        easyllm rag ask runs/docs-index "..." --model qwen-folder --expand 1 --json
    """
    from easyllm.core.errors import ConfigError
    from easyllm.engine import LLM
    from easyllm.engine.loading import check_generator
    from easyllm.retrieval.ask import Reader
    from easyllm.retrieval.generator import EngineGenerator
    from easyllm.retrieval.search import open_retriever
    from easyllm.retrieval.sources import changed_sources

    config = checked_flags(AskConfig, {**finding, **answer}, FINDING, ANSWER)
    if not question.strip():
        raise ConfigError("the question is empty; give a text to search for")
    check_generator(model)  # before the embedder is loaded
    retriever = open_retriever(folder, embedder)
    found = Reader(retriever, EngineGenerator(LLM(model)), config).ask(question)
    changed = changed_sources(retriever.index.state, {p.document for p in found.passages})
    for name in changed:
        sys.stderr.write(f"{name} has changed since it was indexed; run easyllm rag index again\n")
    if json_output:
        print_json({**found.as_dict(), "changed": changed})
        return
    sys.stdout.write(f"{found.text or 'no passage fits the question'}\n\n{found.verdict}\n")
    for citation in found.citations:
        mark = "+" if citation.supported else "-"
        page = f", page {citation.page}" if citation.page else ""
        place = f"[{citation.passage}] {citation.document}{page}: {citation.quote}"
        sys.stdout.write(f"{mark} {citation.statement}\n")
        if citation.passage is not None:
            sys.stdout.write(f"    {place}\n")


@rag_app.command("serve")
@with_flags
def serve(
    folder: IndexFolder,
    model: Annotated[str, typer.Argument(help="Model that answers.")] = "smollm2",
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Port = 8420,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="EASYLLM_API_KEY", help="API key required of clients."),
    ] = None,
    finding: Annotated[Values, SERVED],
    answer: Annotated[Values, ANSWER],
    embedder: EmbedderName = None,
) -> None:
    """Serve a model that answers from an index, over the APIs of OpenAI and Anthropic.

    The passages for the last question are added to the conversation. POST /v1/rag/ask answers with
    citations, POST /v1/rag/search returns passages, GET /v1/rag/documents lists the documents.

    [bold]Examples[/bold]

        easyllm rag serve runs/docs-index

        easyllm rag serve runs/docs-index my-model --passages 5 --expand 1 --port 9000
    """
    from easyllm.retrieval.index import read_state

    config = checked_flags(AskConfig, {**finding, **answer}, SERVED, ANSWER)
    read_state(folder)  # a wrong folder is reported before the port is taken

    def open_documents() -> "Documents":
        from easyllm.retrieval.search import open_retriever
        from easyllm.serve.documents import Documents

        return Documents(open_retriever(folder, embedder), config)

    name = model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    start({name: model}, host=host, port=port, api_key=api_key, open_documents=open_documents)


@rag_app.command("eval")
@with_flags
def evaluate(
    file: Annotated[
        Path,
        typer.Argument(
            callback=home_path,
            help="Questions: SQuAD's format (.json), or rows with question, answer, document "
            "(.jsonl) for --index.",
        ),
    ],
    *,
    index_folder: Annotated[
        Path | None,
        typer.Option("--index", callback=home_path, help="Index that the rows are about."),
    ] = None,
    embedder: EmbedderName = None,
    chunks: Annotated[Values, CHUNKS],
    limit: Annotated[int | None, typer.Option(min=1, help="Number of questions.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model whose answers are evaluated too.", metavar="MODEL"),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Measure retrieval: at which rank the document with the answer is found.

    With SQuAD's format, the file's own paragraphs are indexed and searched. With --model, its
    answers are evaluated: whether they are right, and whether their sources support them. Intervals
    are 95%, by bootstrap over questions.

    [bold]Examples[/bold]

        easyllm rag eval squad.json

        easyllm rag eval squad.json --embedder minilm --limit 200 --json

        easyllm rag eval questions.jsonl --index runs/docs-index

        easyllm rag eval questions.jsonl --index runs/docs-index --model smollm2 --json
    """
    report = _evaluated(file, index_folder, embedder, chunks, limit, model)
    if json_output:
        print_json(report)
        return
    rankings = {"fused": report, **report["rankings"]}
    rows = [
        (name, *(_with_interval(values, m) for m in METRICS)) for name, values in rankings.items()
    ]
    counts = ((report["n"], "question"), (report["documents"], "document"))
    title = ", ".join(f"{n:,} {what}{'' if n == 1 else 's'}" for n, what in counts)
    print_table(title, ("ranking", *METRICS), rows)
    for name, found in report.get("answers", {}).items():
        value = "-" if found["value"] is None else f"{found['value']:.3f}"
        sys.stdout.write(f"{name:<20} {value} ({found['n']} questions)\n")


METRICS = ("recall_at_1", "recall_at_5", "mrr_at_10", "ndcg_at_10")


def _evaluated(
    file: Path,
    folder: Path | None,
    embedder: str | None,
    chunks: Values,
    limit: int | None,
    model: str | None,
) -> JsonMapping:
    """Returns the figures of an evaluation.

    Raises:
        ConfigError: rows without an index, or an index for paragraphs that are in the file.
    """
    from easyllm.core.errors import ConfigError
    from easyllm.embed.embedder import load_embedder
    from easyllm.engine.loading import check_generator
    from easyllm.retrieval.evaluate import paragraph_retriever
    from easyllm.retrieval.question_files import read_questions
    from easyllm.retrieval.search import open_retriever

    given = read_questions(file, limit)
    if given.paragraphs and folder is not None:
        raise ConfigError(f"{file} contains its own paragraphs; leave --index out")
    if not given.paragraphs and folder is None:
        raise ConfigError(f"{file} contains questions only; name their index with --index FOLDER")
    if model is not None:
        check_generator(model)
    if folder is not None:
        return _figures(open_retriever(folder, embedder), given, model)
    config = checked_flags(ChunkConfig, chunks, CHUNKS)
    loaded = load_embedder(embedder or DEFAULT_EMBEDDER)
    with paragraph_retriever(given.paragraphs, loaded, config) as retriever:
        return _figures(retriever, given, model)


def _figures(retriever: "Retriever", given: "QuestionSet", model: str | None) -> JsonMapping:
    """Returns the figures of retrieval, and with a model those of its answers."""
    from easyllm.retrieval.evaluate import evaluate_retrieval

    report = evaluate_retrieval(retriever, given.questions).as_dict()
    if model is None:
        return report
    from easyllm.engine import LLM
    from easyllm.retrieval.ask import Reader
    from easyllm.retrieval.evaluate_answers import evaluate_answers
    from easyllm.retrieval.generator import EngineGenerator

    reader = Reader(retriever, EngineGenerator(LLM(model)))
    return report | {"answers": evaluate_answers(reader, given.questions).as_dict()}


def _with_interval(values: JsonMapping, name: str) -> str:
    low, high = values["intervals"][name]
    return f"{values[name]:.3f} ({low:.3f}-{high:.3f})"
