"""The HTML page of the report: configuration, totals, charts, samples and events."""

import base64
import hashlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from easyllm.core.json_types import JsonObject
from easyllm.core.progress import format_duration
from easyllm.reporting.charts import (
    GIB,
    charts_of,
    escaped,
    figure,
    number_text,
    running_mean,
    step_range,
)
from easyllm.reporting.history import Facts, Floats, History
from easyllm.reporting.static import SCRIPT, STYLE
from easyllm.train.metrics import FILE as METRICS_FILE

MAX_FIGURES, MAX_EVENTS, MAX_PROMPTS, MAX_ROWS, MAX_CHARACTERS = 40, 100, 12, 20, 600
"""Limits that keep the page small for runs of any length; the page says what is omitted."""


def build_page(facts: Facts) -> str:
    """Returns the complete HTML page of the report."""
    main, others = charts_of(facts.history)
    figures = "".join(figure(chart, facts.history) for chart in main)
    body = [_head(facts)]
    body.append(
        f'<section class="charts">{figures or "<p>No steps have been logged yet.</p>"}</section>'
    )
    body += [_diagnosis(facts.diagnosis), _samples(facts.history.samples)]
    body.append(_events(facts.history.events))
    if others:
        title = f"Other metrics ({len(others)})"
        small = "".join(figure(chart, facts.history) for chart in others[:MAX_FIGURES])
        left = len(others) - MAX_FIGURES
        note = f"<p>{left} more are in {METRICS_FILE}.</p>" if left > 0 else ""
        body.append(_folded("metrics", title, f'<section class="charts">{small}</section>{note}'))
    if facts.recipe_text:
        body.append(_folded("recipe", "Recipe", f"<pre>{escaped(facts.recipe_text)}</pre>"))
    first, last = step_range(facts.history)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(facts.name)} · {facts.state}</title>\n<style>{STYLE}</style></head>\n"
        f'<body data-state="{facts.state}" data-first="{first}" data-last="{last}">\n'
        f"{chr(10).join(part for part in body if part)}\n<script>{SCRIPT}</script></body></html>\n"
    )


def _head(facts: Facts) -> str:
    now = time.time()
    iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    tiles = "".join(
        f"<div><dt>{label}</dt><dd>{value}</dd><dd class=note>{note}</dd></div>"
        for label, value, note in _tiles(facts)
    )
    recipe = " · ".join(
        f"<span>{escaped(_short(part))}</span>" for part in _recipe_words(facts.recipe)
    )
    bar = ""
    if facts.state != "finished" and facts.total_steps:
        bar = f'<progress max="{facts.total_steps}" value="{facts.history.last_step}"></progress>'
    return (
        f"<header><h1>{escaped(facts.name)}</h1>"
        f'<p class="state {facts.state}"><b>{facts.state}</b> {escaped(_where(facts))}</p>'
        f'<p class="note">as of <time datetime="{iso}">{written}</time></p></header>'
        f'{bar}<p class="recipe">{recipe}</p><dl>{tiles}</dl>'
    )


def _where(facts: Facts) -> str:
    """Returns the progress, such as `at step 120 of 3,000 · about 4m10s left`."""
    last = facts.history.last_step
    words = f"at step {last:,}"
    if facts.total_steps and facts.state != "finished":
        words += f" of {facts.total_steps:,}"
        seconds = _seconds(facts.history)
        if facts.state == "running" and len(seconds) and last < facts.total_steps:
            left = (facts.total_steps - last) * float(seconds[-50:].mean())
            words += f" · about {format_duration(left)} left"
    ends = [detail for _, kind, detail in facts.history.events if kind == "stopped" and detail]
    return words + (f" · {_short(ends[-1])}" if ends and facts.state != "running" else "")


def _recipe_words(recipe: JsonObject) -> Iterator[str]:
    """Yields short descriptions of the main settings of a recipe."""
    if not recipe:
        return
    model, adapter, data = (recipe.get(name) for name in ("model", "adapter", "data"))
    if isinstance(model, dict):
        size = [f"{k} {model[k]}" for k in ("depth", "size") if model.get(k) is not None]
        model = f"a new model ({', '.join(size) or 'custom configuration'})"
    yield str(model)
    yield _kind(adapter, "rank") if adapter else "all weights trained"
    if isinstance(data, dict):
        files = data.get("shards") or data.get("train") or ()
        names = [files] if isinstance(files, str) else [str(file) for file in files]
        yield f"on {', '.join(names) or data.get('kind', 'generated')}"
    yield _kind(recipe.get("optimizer"), "learning_rate")
    yield f"{_kind(recipe.get('schedule'))} schedule"
    for name, unit in (("batch_size", "sequences per step"), ("batch_tokens", "tokens per step")):
        if recipe.get(name):
            yield f"{recipe[name]:,} {unit}"
    yield f"seed {recipe.get('seed', 0)}"


def _kind(value: object, key: str | None = None) -> str:
    """Returns the kind and one value of a recipe's section, such as `lora, rank 16`."""
    if not isinstance(value, dict):
        return str(value)
    words = str(value.get("kind", "")).replace("_", " ")
    return f"{words}, {key.replace('_', ' ')} {value[key]}" if key in value and key else words


def _tiles(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """Yields the label, value and note of each summary tile."""
    history = facts.history
    steps, losses = history.finite("train/loss_nats")
    if len(losses):
        mean, width = running_mean(losses)
        note = f"nats per token, mean of the last {width}" if width > 1 else "nats per token"
        yield "Training loss", number_text(mean[-1]), note
    steps, losses = history.finite("eval/loss_nats")
    if len(losses):
        best = int(losses.argmin())
        yield (
            "Best evaluation",
            number_text(losses[best]),
            f"nats per token, at step {steps[best]:,.0f}",
        )
    steps, losses = history.finite("retention/loss_nats")
    if len(losses):
        note = f"nats per token; {number_text(losses[0])} at step {steps[0]:,.0f}"
        yield "Retention set", number_text(losses[-1]), note
    tokens, every = _all_steps(history, history.finite("train/tokens")[1])
    trained, _ = _all_steps(history, history.finite("train/trained_tokens")[1])
    if tokens:
        tokens = facts.results.get("tokens", tokens)
        yield (
            "Tokens",
            every + number_text(tokens),
            f"{number_text(trained)} trained" if trained else "",
        )
    seconds = _seconds(history)
    if len(seconds):
        total, every = _all_steps(history, seconds)
        yield "Training time", every + format_duration(total), "excluding evaluations"
        speed = history.finite("speed/tokens_per_s")[1]
        yield "Speed", number_text(float(np.median(speed[-50:]))), "tokens/s, median of the last 50"
    noted = [v for k, v in facts.results.items() if k.startswith("peak_") and k.endswith("_bytes")]
    peak = max([*history.finite("memory/peak_bytes")[1].tolist(), *noted], default=None)
    if peak is not None:
        yield "Peak memory", f"{peak / GIB:.2f}", "GiB"


def _all_steps(history: History, values: Floats) -> tuple[float, str]:
    """Returns the sum over all steps, and `about ` if it is extrapolated from some of them."""
    if len(values) == 0:
        return 0.0, ""
    share = max(1.0, history.last_step / len(values))
    return float(values.sum()) * share, "about " if share > 1 else ""


def _seconds(history: History) -> Floats:
    """Returns the duration of each logged step, in seconds."""
    tokens, speed = history.series("train/tokens")[1], history.series("speed/tokens_per_s")[1]
    if len(tokens) != len(speed):
        return np.zeros(0)
    keep = np.isfinite(tokens) & np.isfinite(speed) & (speed > 0)
    return tokens[keep] / speed[keep]


def _diagnosis(found: JsonObject | None) -> str:
    """Returns what is unusual in the run, with the usual range and what to change."""
    if not found or not found["checked"]:
        return ""
    title = "<section><h2>Diagnosis</h2>"
    if not found["findings"]:
        checks = "1 check" if len(found["checked"]) == 1 else f"{len(found['checked'])} checks"
        return f"{title}<p>Nothing unusual in {checks}.</p></section>"
    rows = (
        (
            f"{each['name']}: {each['metric']} = {number_text(each['value'])}",
            str(each["usual"]),
            str(each["change"]),
        )
        for each in found["findings"]
    )
    return title + _table(("Unusual", "Usual", "What to change"), rows) + "</section>"


def _samples(lines: list[tuple[int, list[Any]]]) -> str:
    """Returns one table per prompt with the completions by step, newest first."""
    if not lines:
        return ""
    spread = np.unique(np.linspace(0, len(lines) - 1, MAX_ROWS).astype(int))[::-1]
    rows: dict[str, list[tuple[int, str]]] = {}
    for step, samples in (lines[i] for i in spread):
        for sample in samples:
            if isinstance(sample, dict):
                row = step, str(sample.get("text", ""))
                rows.setdefault(str(sample.get("prompt", "")), []).append(row)
    tables = [
        f'<p class="prompt" dir="auto">{escaped(_short(prompt))}</p>'
        + _table(("Step", "Continuation"), ((f"{step:,}", _short(text)) for step, text in said))
        for prompt, said in list(rows.items())[:MAX_PROMPTS]
    ]
    notes = []
    if len(lines) > len(spread):
        notes.append(f"{len(spread)} of {len(lines)} steps with samples are shown")
    if len(rows) > MAX_PROMPTS:
        notes.append(f"{MAX_PROMPTS} of {len(rows)} prompts are shown")
    note = f"<p class=note>{'; '.join(notes)}; all are in {METRICS_FILE}.</p>" if notes else ""
    return f"<section><h2>Samples</h2>{''.join(tables)}{note}</section>"


def _events(events: list[tuple[int, str, str]]) -> str:
    if not events:
        return ""
    shown = events[: -MAX_EVENTS - 1 : -1]
    table = _table(("Step", "Event", "Detail"), ((f"{s:,}", k, _short(d)) for s, k, d in shown))
    left = len(events) - len(shown)
    note = f"<p class=note>{left:,} earlier events are in {METRICS_FILE}.</p>" if left else ""
    return f"<section><h2>Events</h2>{table}{note}</section>"


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    lines = (
        "<tr>" + "".join(f'<td dir="auto">{escaped(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _folded(name: str, title: str, content: str) -> str:
    return f'<details id="{name}"><summary>{title}</summary>{content}</details>'


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …"
