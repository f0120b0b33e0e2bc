"""The `easyllm tokenizer` commands: train, report, extend, import, encode."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.models import Model
from easyllm.cli.output import JsonFlag, home_path, print_json, print_pairs, print_table
from easyllm.cli.text_files import hashes_of, text_source, texts_of

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject
    from easyllm.tokenizer.report import TextFigures, TokenizerReport

tokenizer_app = typer.Typer(
    no_args_is_help=True,
    help="""Train a tokenizer, compare several, extend a model's, import from sentencepiece.

    [bold]Examples[/bold]

        easyllm tokenizer train corpus.txt --output out/tok --vocab-size 8000

        easyllm tokenizer report smollm2 out/tok --text en=english.txt --text zh=chinese.jsonl

        easyllm tokenizer encode smollm2 'Hello, world'
    """,
)

Files = Annotated[
    list[str], typer.Argument(help="Files, folders or globs: text, JSON, CSV, Parquet, HTML.")
]
TextKey = Annotated[str, typer.Option(help="Key or column of the text, for structured files.")]
Lines = Annotated[
    bool, typer.Option("--lines", help="Treat each line of a text file as a separate text.")
]
Format = Annotated[
    str, typer.Option("--format", help="File format (text, jsonl ...); by default by suffix.")
]
AnyTokenizer = Annotated[
    str,
    typer.Argument(
        help="A folder with tokenizer.json or tokenizer.model, smollm2, a .gguf file, "
        "or hf:org/name."
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", callback=home_path, help="A new folder for the result."),
]


def register(app: typer.Typer) -> None:
    """Adds the `tokenizer` command group to `app`."""
    app.add_typer(tokenizer_app, name="tokenizer")


@tokenizer_app.command("train")
def train(
    files: Files,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", callback=home_path, help="A new folder for the tokenizer."),
    ],
    kind: Annotated[
        str | None, typer.Option(help="bpe, wordpiece, unigram, wordlevel or characters.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Maximum vocabulary size, special tokens included.")
    ] = None,
    special: Annotated[
        list[str] | None, typer.Option(help="A special token; the first gets id 0.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="chatml, or the source of a Jinja template.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(callback=home_path, help="A YAML file with these and all other options."),
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="key.sub=value, overrides the YAML file.")
    ] = None,
    text_key: TextKey = "text",
    lines: Lines = False,
    format: Format = "auto",
    json_output: JsonFlag = False,
) -> None:
    """Train a tokenizer; equal texts give a byte-identical tokenizer.json.

    [bold]Examples[/bold]

        easyllm tokenizer train corpus/ --output out/tok --vocab-size 32000 --chat-template chatml

        easyllm tokenizer train zh.jsonl -o out/tok --kind unigram --special '<s>' --special '</s>'

        easyllm tokenizer train a.txt -o tok --set model.digits=individual --set model.pattern=qwen2
    """
    from easyllm.core.atomic import atomic_directory, check_output_free, write_json
    from easyllm.core.config import apply_overrides, validate
    from easyllm.core.manifest import MANIFEST_FILE, Manifest
    from easyllm.core.yaml_text import read_yaml
    from easyllm.tokenizer.train import train_tokenizer, vocab_size_warning
    from easyllm.tokenizer.train_config import TokenizerConfig

    values = apply_overrides(
        read_yaml(config, what="configuration") if config is not None else {}, change or []
    )
    values["model"] = {"kind": "bpe"} | values.get("model", {}) | ({"kind": kind} if kind else {})
    flags = {"vocab_size": vocab_size, "special_tokens": special, "chat_template": chat_template}
    values |= {name: value for name, value in flags.items() if value is not None}
    wanted = validate(TokenizerConfig, values, source=str(config or "tokenizer train"))
    check_output_free(output)
    source = text_source(files, text_key, lines, format)
    trained = train_tokenizer(texts_of(source), wanted)
    manifest = Manifest.create(
        "tokenizer", config=wanted.model_dump(mode="json"), inputs=hashes_of(source)
    )
    with atomic_directory(output) as work:
        trained.save(work)
        write_json(work / MANIFEST_FILE, manifest.model_dump(mode="json"))
    figures: JsonObject = {"kind": wanted.model.kind, "vocab_size": trained.vocab_size}
    if (reason := vocab_size_warning(trained, wanted)) is not None:
        figures["vocab_size_asked"] = wanted.vocab_size
        typer.echo(reason, err=True)
    figures["output"] = str(output)
    print_json(figures) if json_output else print_pairs(figures)


@tokenizer_app.command("report")
def report(
    tokenizers: Annotated[
        list[str],
        typer.Argument(
            help="Folders with tokenizer.json or tokenizer.model, smollm2, .gguf files, "
            "hf:org/name."
        ),
    ],
    text: Annotated[
        list[str], typer.Option(help="name=PATH: texts of a language or domain; repeatable.")
    ],
    text_key: TextKey = "text",
    lines: Lines = False,
    format: Format = "auto",
    json_output: JsonFlag = False,
) -> None:
    """Compare tokenizers on texts: compression, fertility, lossless decoding, unused tokens.

    Fertility is the number of tokens per word; a Han character counts as a word.

    [bold]Examples[/bold]

        easyllm tokenizer report smollm2 --text zh=chinese.txt

        easyllm tokenizer report smollm2 out/tok --text en=en.txt --text zh=zh.jsonl --json
    """
    from easyllm.core.errors import ConfigError
    from easyllm.models import load_tokenizer
    from easyllm.tokenizer.report import report as measure

    sources = {}
    for entry in text:
        name, equals, path = entry.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--text {entry!r} is not name=PATH; write --text en=english.txt")
        sources[name] = text_source([path], text_key, lines, format)
    loaded = {name: load_tokenizer(name) for name in tokenizers}
    result = measure(loaded, {name: texts_of(source) for name, source in sources.items()})
    if json_output:
        print_json(result.as_dict())
    else:
        _show(result)


@tokenizer_app.command("extend")
def extend(
    model: Model,
    files: Files,
    output: Output = None,
    new: Annotated[int, typer.Option(min=1, help="Number of tokens to add.")] = 8000,
    script: Annotated[
        str, typer.Option(help="Learn from all non_ascii text, or only from han characters.")
    ] = "non_ascii",
    text_key: TextKey = "text",
    lines: Lines = False,
    format: Format = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default as stored.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the figures without writing anything.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Add tokens of a language to a model's tokenizer and resize its embeddings; ASCII ids stay.

    Each new embedding row is the mean of the rows of the tokens that it replaces, so train the
    model further before using it. Losses on the first 500 characters are reported per old token
    (before; after, over the old ids only, which must be equal; after, over all ids) and per byte
    (in old and in new tokens).

    [bold]Examples[/bold]

        easyllm tokenizer extend smollm2 chinese.txt --new 8000 --dry-run

        easyllm tokenizer extend smollm2 zh/*.jsonl --new 8000 --output out/smollm2-zh
    """
    from easyllm.core.atomic import check_output_free
    from easyllm.core.device import parse_dtype
    from easyllm.core.errors import ConfigError
    from easyllm.pipeline.extension import ModelExtension
    from easyllm.tokenizer.extend import SCRIPTS

    if script not in SCRIPTS:
        raise ConfigError(f"script={script!r} is not known; use {' or '.join(SCRIPTS)}")
    if output is None and not dry_run:
        raise ConfigError("no output folder is given; add --output out/NAME or --dry-run")
    if output is not None:
        check_output_free(output)
    if dtype is not None:
        parse_dtype(dtype)
    source = text_source(files, text_key, lines, format)
    extension = ModelExtension(model, lambda: texts_of(source), num_new=new, script=script)
    figures = extension.growth()
    if not dry_run:
        assert output is not None
        figures |= extension.save(output, inputs=hashes_of(source), dtype=dtype)
        figures["output"] = str(output)
    if json_output:
        print_json(figures)
    else:
        print_pairs({name.replace("_", " "): value for name, value in figures.items()})


@tokenizer_app.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(callback=home_path, help="A sentencepiece .model file.")],
    output: Annotated[
        Path, typer.Argument(callback=home_path, help="A new folder for the tokenizer.")
    ],
    add_bos: Annotated[
        bool, typer.Option("--add-bos", help="Encoding prepends BOS (Llama).")
    ] = False,
    add_eos: Annotated[bool, typer.Option("--add-eos", help="Encoding appends EOS (T5).")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Convert a sentencepiece model (unigram or BPE) to tokenizer.json with the same ids.

    [bold]Examples[/bold]

        easyllm tokenizer import tokenizer.model out/tok --add-bos
    """
    from easyllm.core.atomic import atomic_directory
    from easyllm.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_sentencepiece(file, add_bos=add_bos, add_eos=add_eos)
    with atomic_directory(output) as work:
        tokenizer.save(work)
    figures = {"vocab_size": tokenizer.vocab_size, "output": str(output)}
    print_json(figures) if json_output else print_pairs(figures)


@tokenizer_app.command("encode")
def encode(
    tokenizer: AnyTokenizer,
    text: Annotated[str | None, typer.Argument(help="By default standard input.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Omit the special tokens that the model expects.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Show the tokens of a text.

    [bold]Examples[/bold]

        easyllm tokenizer encode smollm2 '你好, world'

        echo hello | easyllm tokenizer encode out/tok --json
    """
    from easyllm.models import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    ids = loaded.encode(sys.stdin.read() if text is None else text, special_tokens=not plain)
    pieces = [loaded.token_text(i) for i in ids]
    if json_output:
        print_json({"ids": ids, "pieces": pieces})
        return
    rows = [(i, loaded.backend.id_to_token(i), repr(p)) for i, p in zip(ids, pieces, strict=True)]
    print_table(f"{len(ids)} tokens", ("id", "token", "text"), rows)


# ---- printing


def _show(result: "TokenizerReport") -> None:
    columns = ("tokenizer", "text", "bytes", "chars", "fertility", "Han", "unknown", "changed")
    title = "Texts: bytes and chars per token, tokens per word, Han characters that are one token"
    print_table(title, columns, [_row(figures) for figures in result.texts])
    rows = [
        (v.tokenizer, f"{v.vocab_size:,}", f"{v.num_unused:,}", f"{v.gb2312_coverage:.1%}")
        for v in result.vocabularies
    ]
    print_table("Vocabularies", ("tokenizer", "ids", "unused here", "of GB 2312"), rows)
    for figures in result.texts:
        if failure := figures.failure:
            sys.stdout.write(
                f"{figures.tokenizer} changes {figures.domain} at character {failure.at}: "
                f"{failure.text!r} is decoded as {failure.decoded!r}\n"
            )


def _row(figures: "TextFigures") -> tuple[str, ...]:
    coverage = figures.han_coverage
    return (
        figures.tokenizer,
        figures.domain,
        f"{figures.bytes_per_token:.3f}",
        f"{figures.characters_per_token:.3f}",
        f"{figures.fertility:.3f}",
        "-" if coverage is None else f"{coverage:.1%}",
        f"{figures.num_unknown:,}",
        f"{figures.num_failures:,}/{figures.num_texts:,}",
    )
