"""Frames of the chat page while an answer streams into a conversation of 300 messages: a JSON row.

    python bench/page.py [--messages 300] [--pieces 400] [--rounds 3] [--record]

The conversation has code, tables and lists. An answer of `--pieces` pieces, one every 16 ms,
streams into it; the browser's own trace (DevTools) gives the tasks of the page's main thread.
Reported are the tasks in which a frame was made, in ms (median, p95, longest), and the share of the
time in which the main thread was busy, before and after two measures that the page takes: messages
out of sight are not laid out (`content-visibility`), and only the last block of a growing message
is rendered again. "Before" switches both off in the running page. The two are measured in turn.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests")]
TEXT = (
    "## Part {n}\n\nA list:\n\n- one **bold** item\n- another with `code`\n\n```python\n"
    "def f{n}(values):\n    total = 0\n    for value in values:\n        total += value * {n}\n"
    "    return total\n```\n\n| a | b |\n| --- | --- |\n| {n} | two |\n\nAnd a closing sentence.\n"
)
BEFORE = (
    "(() => { const s = new CSSStyleSheet();"
    " s.replaceSync('.message, .pair { content-visibility: visible !important }');"
    " document.adoptedStyleSheets = [s];"
    " Object.defineProperty(Element.prototype, 'markdownBlocks', { get: () => undefined,"
    " set(blocks) { const kept = new Set(blocks.map(block => block.node));"
    " for (const child of [...this.children]) if (!kept.has(child)) child.remove(); } }) })()"
)
FAKE = (
    "(() => { const real = fetch, encoder = new TextEncoder(); window.fetch = async (path, options)"
    " => { if (path !== '/v1/chat/completions') return real(path, options);"
    " const pieces = %s; let at = 0; return new Response(new ReadableStream({ async pull(control) {"
    " await new Promise(done => setTimeout(done, 16));"
    " const last = at === pieces.length, delta = last ? {} : { content: pieces[at++] };"
    " const choice = { delta, finish_reason: last ? 'stop' : null };"
    " control.enqueue(encoder.encode('data: ' + JSON.stringify({ choices: [choice] }) + '\\n\\n'));"
    " if (last) control.close() } })) } })()"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=300)
    parser.add_argument("--pieces", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    runs = measured(options)
    found = {
        name: {key: round(statistics.median(run[key] for run in each), 2) for key in each[0]}
        for name, each in runs.items()
    }
    row = machine.row(
        "page",
        **{k: getattr(options, k) for k in ("messages", "pieces", "rounds")},
        **found,
        runs=runs,
    )
    machine.finish(row, "page", record=options.record)


def measured(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Measures both sides in turn, each in a fresh page."""
    from browser import running_browser
    from easyllm.engine import LLM
    from running_server import running

    found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    llm = LLM("smollm2", max_running=1)  # it answers nothing but the counting of tokens
    with (
        tempfile.TemporaryDirectory() as folder,
        running({"m": llm}) as address,
        running_browser(Path(folder)) as browser,
    ):
        for _ in range(options.rounds):
            for name, runs in found.items():
                with browser.page(f"{address}/?lang=en") as page:
                    runs.append(one(page, options, before=name == "before"))
                print(name, runs[-1], file=sys.stderr, flush=True)
    return found


def one(page: Any, options: argparse.Namespace, *, before: bool) -> dict[str, float]:
    """Returns the figures of one answer."""
    page.wait_for("document.querySelector('#model-0').value === 'm'")
    if before:
        page.evaluate(BEFORE)
    answer = TEXT.format(n=0) * 20
    size = -(-len(answer) // options.pieces)
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    page.evaluate(FAKE % json.dumps(pieces))
    page.evaluate(
        "Promise.all([import('/assets/js/state.js'), import('/assets/js/tree.js')])"
        ".then(([s, t]) => {"
        f" for (let n = 0; n < {options.messages}; n++) t.addNode(s.state.conversation,"
        " s.state.conversation.head, n % 2 ? 'assistant' : 'user',"
        f" {{ content: {json.dumps(TEXT)}.replaceAll('{{n}}', n), model: 'm' }});"
        " s.changed('thread') })"
    )
    time.sleep(2)
    events: list[dict[str, Any]] = []
    page.listen("Tracing.dataCollected", lambda params: events.extend(params["value"]))
    page.call("Tracing.start", categories="toplevel,devtools.timeline", transferMode="ReportEvents")
    page.type("#question", "go")
    page.press("Enter")
    page.wait_for("document.querySelector('.message:last-child').dataset.state === 'done'", 600)
    page.call("Tracing.end")
    page.wait_for_event("Tracing.tracingComplete")
    return figures(events)


def figures(events: list[dict[str, Any]]) -> dict[str, float]:
    """Returns what the main thread of the page did: tasks with a frame, and its busy share."""
    mains = {(e["pid"], e["tid"]) for e in events if e["name"] == "FireAnimationFrame"}
    own = [e for e in events if (e["pid"], e["tid"]) in mains]
    tasks = [
        e for e in own if e["name"] in ("RunTask", "ThreadControllerImpl::RunTask") and "dur" in e
    ]
    frames = [e["ts"] for e in own if e["name"] == "FireAnimationFrame"]
    made = sorted(
        task["dur"] / 1000
        for task in tasks
        if any(task["ts"] <= at <= task["ts"] + task["dur"] for at in frames)
    )
    begin, end = min(e["ts"] for e in tasks), max(e["ts"] + e["dur"] for e in tasks)
    return {
        "frames": len(made),
        "median_ms": round(statistics.median(made), 2),
        "p95_ms": round(made[int(len(made) * 0.95)], 2),
        "longest_ms": round(made[-1], 2),
        "busy_share": round(sum(task["dur"] for task in tasks) / (end - begin), 3),
    }


if __name__ == "__main__":
    main()
