"""The `easyllm data inspect` command."""

import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.output import JsonFlag, home_path, print_json, print_pairs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from easyllm.examples.inspect import Inspected, Inspection, Piece

SHOWN = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
LEGEND = "   · space   ⏎ newline   字³ a character of 3 tokens"
STYLES = {True: ("black on green", "black on bright_green"), False: ("", "dim")}
"""Styles of trained and other tokens; the two alternate to make token boundaries visible."""


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            callback=home_path,
            help="A .json or .jsonl file of conversations, pairs or labelled samples.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(help="Source of template and tokenizer: smollm2, folder, .gguf, hf:org/name."),
    ] = "smollm2",
    samples: Annotated[int, typer.Option(min=0, help="Number of samples to show.")] = 3,
    max_seq_len: Annotated[
        int | None, typer.Option(min=2, help="Truncate longer samples, as training does.")
    ] = None,
    split_turns: Annotated[
        bool, typer.Option("--split-turns", help="Make each response a separate sample.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Show samples token by token with trained tokens marked, and summarize the complete file.

    [bold]Examples[/bold]

        easyllm data inspect my-data.jsonl

        easyllm data inspect pairs.json --model smollm2 --samples 1 --max-seq-len 512

        easyllm data inspect my-data.jsonl --json
    """
    from easyllm.examples.inspect import inspect_file
    from easyllm.models import load_tokenizer

    found = inspect_file(
        file,
        load_tokenizer(model),
        num_samples=samples,
        max_seq_len=max_seq_len,
        split_turns=split_turns,
    )
    if json_output:
        print_json({"file": str(file), "model": model} | found.as_dict())
        return
    print_pairs(_figures(found))
    _show(found.samples)


def _figures(found: "Inspection") -> dict[str, str | int]:
    """Returns the non-trivial counts, under user-facing names."""
    account = found.account
    share = 100 * account.trained_tokens / account.tokens if account.tokens else 0.0
    sizes = [found.length_at(fraction) for fraction in (0.5, 0.95, 1.0)]
    optional = {
        "turns": account.turns,
        "good": found.labels.get("good", 0),
        "bad": found.labels.get("bad", 0),
    }
    dropped = {
        "dropped: too long": account.dropped_overlong,
        "dropped: no trained tokens": account.dropped_untrained,
        "dropped: identical responses": account.dropped_equal,
        "tools omitted by the template": account.unwritten_tools,
        "reasoning omitted by the template": account.unwritten_reasoning,
        "messages omitted by the template": account.unrendered_messages,
        "tool calls omitted, not trained": account.untrained_calls,
    }
    return {
        "format": account.format_text(),
        "rows": account.rows,
        **{name: count for name, count in optional.items() if count},
        "samples": account.samples,
        "trained tokens": f"{account.trained_tokens} ({share:.1f}%)",
        "prompt tokens": account.prompt_tokens,
        "tokens per sequence": f"median {sizes[0]}, 95% {sizes[1]}, longest {sizes[2]}",
        "truncated": account.cut,
        **{name: count for name, count in dropped.items() if count},
    }


def _show(samples: "list[Inspected]") -> None:
    """Prints the samples: in colour on a terminal, with marks otherwise or if NO_COLOR is set."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not samples:
        return
    if console.is_terminal and not console.no_color:
        _show_coloured(samples, console)
    else:
        _show_marked(samples)


def _show_coloured(samples: "list[Inspected]", console: "Console") -> None:
    from rich.text import Text

    console.print(Text("\n").append("trained", STYLES[True][0]).append(LEGEND))
    for sample in samples:
        for part in sample.parts:
            console.print(Text(f"\n{sample.location} {part.heading}", "bold"))
            text = Text()
            for number, piece in enumerate(part.pieces):
                text.append(visible_text(piece), STYLES[piece.trained][number % 2])
                text.append("\n" if "\n" in piece.text else "")
            text.rstrip()
            console.print(text)


def _show_marked(samples: "list[Inspected]") -> None:
    lines = [f"\n⟦trained⟧{LEGEND}"]
    for sample in samples:
        for part in sample.parts:
            lines += [f"\n{sample.location} {part.heading}", marked_text(part.pieces)]
    sys.stdout.write("\n".join(lines) + "\n")


def marked_text(pieces: "Iterable[Piece]") -> str:
    """Returns tokens separated by `│` and runs of trained ones in `⟦ ⟧`, one text line per line."""
    text = ""
    for trained, run in groupby(pieces, key=lambda piece: piece.trained):
        cells = (visible_text(p) + ("\n" if "\n" in p.text else "") for p in run)
        joined = "│".join(cells).replace("\n│", "\n")
        body = joined.removesuffix("\n")
        text += (f"⟦{body}⟧" if trained else body) + joined[len(body) :]
    return text.removesuffix("\n")


def visible_text(piece: "Piece") -> str:
    """Returns a token's text with visible blanks and control characters.

    A superscript gives the number of tokens that the piece consists of, if there is more than one.
    """
    text = piece.text.translate(SHOWN)
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    many = len(piece.token_ids)
    return text if many == 1 else text + str(many).translate(RAISED)
