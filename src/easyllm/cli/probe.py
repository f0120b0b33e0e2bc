"""The `easyllm probe` command."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.output import JsonFlag, home_path, print_json, print_table

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject
    from easyllm.nn.decoder import Decoder
    from easyllm.tokenizer.tokenizer import Tokenizer

EXPERTS = "experts"
MAX_TOKENS = 64
"""Texts of `probe experts` are cut to this many tokens each, 32 texts at most."""
MAX_TEXTS = 32


def register(app: typer.Typer) -> None:
    """Adds the `probe` command to `app`."""
    app.command("probe")(probe)


def probe(
    model: Annotated[str, typer.Argument(help="A model source; or the word experts.")],
    text: Annotated[str, typer.Argument(help="A text; or, after experts, a model source.")],
    file: Annotated[
        Path | None,
        typer.Argument(callback=home_path, help="After experts: a file with a text on each line."),
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(help="Part of the text to corrupt and restore (causal tracing)."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Predictions and neurons shown of a layer.")] = 3,
    output: Annotated[
        Path | None, typer.Option(callback=home_path, help="An .svg file for the picture.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Look inside a model: what its layers contribute, predict and recall, and miss if removed.

    Blocks are removed one at a time, and the increase of the loss is shown. The neurons listed are
    those that add most at the last token, with the tokens they promote. easyllm probe experts MODEL
    FILE shows the load of each expert of a mixture and the loss without it.

    [bold]Examples[/bold]

        easyllm probe smollm2 "The capital of France is"

        easyllm probe smollm2 "The Eiffel Tower is in" --subject "The Eiffel Tower" --output t.svg

        easyllm probe experts out/moe lines.txt --json
    """
    from easyllm.core.errors import ConfigError
    from easyllm.models import load_model, load_tokenizer

    if model == EXPERTS:
        if file is None:
            raise ConfigError(
                "probe experts needs a file of texts: easyllm probe experts MODEL FILE"
            )
        _experts(load_model(text, dtype="float32"), load_tokenizer(text), file, output, json_output)
        return
    if file is not None:
        raise ConfigError(
            "a file of texts belongs to easyllm probe experts MODEL FILE; leave it out"
        )
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ConfigError(f"the text has {len(ids)} tokens, expected at least 2; give a longer one")
    span = None if subject is None else _span(tokenizer, text, subject)
    found = _probe(load_model(model, dtype="float32"), tokenizer, ids, span, top)
    if output is not None:
        _draw(found, output)
    if json_output:
        print_json(found)
    else:
        _print(found)


def _span(tokenizer: "Tokenizer", text: str, subject: str) -> tuple[int, int]:
    """Returns the tokens of a part of the text.

    Raises:
        ConfigError: the text does not contain it.
    """
    from easyllm.core.errors import ConfigError

    at = text.find(subject)
    if at < 0 or not subject:
        raise ConfigError(f"the text does not contain the subject {subject!r}; give a part of it")
    offsets = tokenizer.backend.encode(text).offsets
    inside = [i for i, (a, b) in enumerate(offsets) if a < at + len(subject) and b > at and a < b]
    return inside[0], inside[-1] + 1


def _probe(
    model: "Decoder",
    tokenizer: "Tokenizer",
    ids: list[int],
    span: tuple[int, int] | None,
    top: int,
) -> "JsonObject":
    """Returns all figures, with tokens as text."""
    from easyllm.probe import (
        block_importance,
        causal_trace,
        logit_lens,
        read_memories,
        residual_contributions,
    )

    def text_of(token: int) -> str:
        return tokenizer.decode([token])

    lens = logit_lens(model, ids, top=top)
    found: JsonObject = {
        "tokens": [text_of(i) for i in ids],
        "predicts": text_of(lens[-1].token_ids[0]),
        "contributions": [
            {"name": c.name, "layer": c.layer, "norm": c.norm, "logit": c.logit}
            for c in residual_contributions(model, ids)
        ],
        "lens": [asdict(row) | {"tokens": [text_of(i) for i in row.token_ids]} for row in lens],
        "without": [asdict(each) for each in block_importance(model, ids)],
    }
    if not model.config.has_experts:
        found["memories"] = [
            asdict(m) | {"promotes": [text_of(i) for i in m.promotes]}
            for m in read_memories(model, ids, per_layer=top)
        ]
    if span is not None:
        found["trace"] = asdict(causal_trace(model, ids, span)) | {"subject": list(span)}
    return found


def _print(found: "JsonObject") -> None:
    terms = {(c["name"], c["layer"]): c for c in found["contributions"]}
    lost = {(w["block"], w["layer"]): w["loss_nats"] for w in found["without"]}
    rows = []
    for lens in found["lens"]:
        layer = lens["layer"]
        guesses = " · ".join(
            f"{token!r} {p:.0%}"
            for token, p in zip(lens["tokens"], lens["probabilities"], strict=True)
        )
        if layer < 0:
            rows.append(("-", f"{terms['embedding', None]['norm']:.1f}", "", "", "", guesses))
            continue
        attention, feed_forward = terms["attention", layer], terms["feed_forward", layer]
        rows.append(
            (
                str(layer),
                f"{attention['norm']:.1f}",
                f"{feed_forward['norm']:.1f}",
                f"{lost['mixer', layer]:+.2f}",
                f"{lost['feed_forward', layer]:+.2f}",
                guesses,
            )
        )
    columns = ("layer", "attention", "feed-forward", "without", "without", "would predict")
    title = f"Predicts {found['predicts']!r}: lengths of contributions, losses in nats without them"
    print_table(title, columns, rows)
    if "trace" in found:
        trace = found["trace"]
        best = max(
            (p, layer, token)
            for layer, row in enumerate(trace["restored"])
            for token, p in enumerate(row)
        )
        sys.stdout.write(
            f"p({found['predicts']!r}) is {trace['clean']:.1%}, {trace['corrupted']:.1%} with the "
            f"subject corrupted, and {best[0]:.1%} with layer {best[1]} restored at "
            f"{found['tokens'][best[2]]!r}\n"
        )


def _draw(found: "JsonObject", output: Path) -> None:
    """Writes the picture: the trace if there is one, else what each block contributes."""
    from easyllm.core.atomic import write_atomic
    from easyllm.probe.picture import heat_map

    if "trace" in found:
        values = found["trace"]["restored"]
        picture = heat_map(
            f"p({found['predicts']!r}) with one state restored",
            values,
            rows=[f"layer {n}" for n in range(len(values))],
            columns=found["tokens"],
        )
    else:
        layers = range(len(found["lens"]) - 1)
        parts = ("attention", "feed_forward")
        terms = {(c["name"], c["layer"]): c for c in found["contributions"]}
        key = "norm" if terms["attention", 0]["logit"] is None else "logit"
        lost = {(w["block"], w["layer"]): w["loss_nats"] for w in found["without"]}
        rows = {part: [terms[part, n][key] for n in layers] for part in parts}
        rows |= {
            "without attention": [lost["mixer", n] for n in layers],
            "without feed-fwd": [lost["feed_forward", n] for n in layers],
        }
        what = "contributions to its logit" if key == "logit" else "lengths of contributions"
        picture = heat_map(
            f"{found['predicts']!r}: {what}, and nats lost without each block",
            list(rows.values()),
            rows=[name.replace("_", "-") for name in rows],
            columns=[str(n) for n in layers],
        )
    write_atomic(output, picture.encode("utf-8"))


def _experts(
    model: "Decoder",
    tokenizer: "Tokenizer",
    file: Path,
    output: Path | None,
    json_output: bool,
) -> None:
    from easyllm.core.atomic import write_atomic
    from easyllm.core.errors import ConfigError, SourceError, read_failure
    from easyllm.probe import probe_experts
    from easyllm.probe.picture import heat_map

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file} cannot be read ({read_failure(error)}); give a text file"
        ) from None
    texts = [tokenizer.encode(line)[:MAX_TOKENS] for line in lines if line.strip()]
    texts = [ids for ids in texts if len(ids) > 1][:MAX_TEXTS]
    if not texts:
        raise ConfigError(f"{file} has no line of at least two tokens; give a text on each line")
    reports = probe_experts(model, texts)
    if output is not None:
        values = [report.loss_nats or [] for report in reports]
        picture = heat_map(
            "Nats lost without each expert",
            values,
            rows=[f"layer {report.layer}" for report in reports],
            columns=[str(n) for n in range(len(values[0]))],
        )
        write_atomic(output, picture.encode("utf-8"))
    if json_output:
        print_json([asdict(report) for report in reports])
        return
    rows = [
        (
            report.layer,
            f"{report.entropy:.2f}",
            " ".join(f"{share:.0%}" for share in report.load),
            " ".join(f"{loss:+.2f}" for loss in report.loss_nats or ()),
        )
        for report in reports
    ]
    columns = ("layer", "entropy", "load of each expert", "loss without it, nats")
    print_table("Experts", columns, rows)
