"""Documents per CPU second through FineWeb's four filters, ours and datatrove's; one JSON row.

    python bench/clean.py [--data FILE] [--rounds 5] [--peer PYTHON] [--record]

The filters are Gopher's repetition and quality filters, C4's without the punctuation rule, and
FineWeb's own, in that order, on one thread; `whole_preset` adds text repair and language
identification. Times are CPU times, which are least affected by other load on the machine. With
`--peer` (an interpreter that has `datatrove` and `spacy`), the same texts pass through datatrove's
filters in the same session, twice: with the tokenizer it uses for English (spaCy's rules), and with
our words and sentences, which isolates the filters. The sides alternate, each in a separate
process, and the ratios are medians over the rounds. Agreement is the share of documents for which
a filter, applied to the original text, decides the same on both sides.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import machine
from machine import SHARED

OURS = ("filters", "whole_preset")
PEERS = ("datatrove", "datatrove_our_words")
FILTERS = ("gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality")
TURN_S = 1.0
"""Minimum duration of a side's passes over the texts in each round."""

Verdicts = dict[str, list[str | None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "c4_demo.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", help="Python interpreter with datatrove and spacy")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--side", choices=OURS + PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--patterns", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    texts = read_texts(options.data)
    if options.side:
        answer(options, texts)
        return
    row = machine.row(
        "clean",
        texts={
            "file": options.data.name if options.data.is_file() else "generated",
            "documents": len(texts),
            "characters": sum(map(len, texts)),
        },
        threads=1,
        **compare(options),
    )
    machine.finish(row, "clean", record=options.record)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Alternates the sides; returns documents per second, time ratios and filter agreement."""
    names = OURS + (PEERS if options.peer else ())
    with ExitStack() as stack:
        asked = {
            name: stack.enter_context(
                side(name, sys.executable if name in OURS else options.peer, options.data)
            )
            for name in names
        }
        about = {name: ask("about") for name, ask in asked.items()}
        rounds = [{name: ask("time") for name, ask in asked.items()} for _ in range(options.rounds)]
        verdicts = {name: ask("verdicts") for name, ask in asked.items()}
    figures: dict[str, Any] = {
        "rounds": options.rounds,
        "documents_per_cpu_s": {name: spread([r[name] for r in rounds]) for name in names},
        "kept": {name: about[name]["kept"] for name in names},
    }
    if options.peer:
        figures["peer"] = about["datatrove"]["versions"]
        figures["ratio_to"] = {
            name: spread([r["filters"] / r[name] for r in rounds]) for name in PEERS
        }
        figures["agreement"] = {
            name: agreement(verdicts["filters"], verdicts[name]) for name in PEERS
        }
    return figures


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
    }


def agreement(ours: Verdicts, theirs: Verdicts) -> dict[str, dict[str, float]]:
    """Returns, by filter, the share of equal decisions and the shares rejected by one side only."""
    found = {}
    for name in FILTERS:
        pairs = [(a is None, b is None) for a, b in zip(ours[name], theirs[name], strict=True)]
        found[name] = {
            "agree": round(sum(a == b for a, b in pairs) / len(pairs), 4),
            "only_we_reject": sum(b and not a for a, b in pairs),
            "only_they_reject": sum(a and not b for a, b in pairs),
        }
    return found


@contextmanager
def side(name: str, python: str, data: Path) -> Iterator[Callable[[str], Any]]:
    """Starts a single-threaded process for one side that answers one question per line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [python, __file__, "--side", name, "--data", str(data)]
    command += ["--patterns", json.dumps(our_patterns())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin
        assert process.stdout
        stdin, stdout = process.stdin, process.stdout

        def ask(question: str) -> Any:
            stdin.write(question + "\n")
            stdin.flush()
            return json.loads(stdout.readline())

        yield ask
        stdin.close()


def answer(options: argparse.Namespace, texts: list[str]) -> None:
    """Answers the questions on standard input: `about`, `time`, `verdicts`."""
    if options.side == "datatrove_our_words":
        give_our_words(options.patterns)
    build = our_side if options.side in OURS else their_side
    keeps, verdicts_of, versions = build(options.side)
    for question in map(str.strip, sys.stdin):
        reply: Any
        if question == "about":
            reply = {"versions": versions, "kept": sum(map(keeps, texts))}
        elif question == "time":
            passes, start = 0, time.process_time()
            while (seconds := time.process_time() - start) < TURN_S:
                for text in texts:
                    keeps(text)
                passes += 1
            reply = passes * len(texts) / seconds
        else:
            reply = {x: [verdicts_of(x, text) for text in texts] for x in FILTERS}
        print(json.dumps(reply), flush=True)


Side = tuple[Callable[[str], bool], Callable[[str, str], str | None], dict[str, str]]


def our_side(name: str) -> Side:
    from easyllm.corpus.clean import PRESETS, CleanConfig, Cleaner, TextView, Violation
    from easyllm.corpus.document import Document

    without = ("normalise", "language") if name == "filters" else ()
    cleaner = Cleaner(CleanConfig(preset="fineweb", without=without))
    rules = {rule.kind: rule for rule in PRESETS["fineweb"]}

    def keeps(text: str) -> bool:
        return isinstance(cleaner.clean(Document(id="", source="", text=text)), Document)

    def verdict(kind: str, text: str) -> str | None:
        result = rules[kind].apply(TextView(text))
        return result.rule if isinstance(result, Violation) else None

    return keeps, verdict, {}


def their_side(_name: str) -> Side:
    from importlib.metadata import version

    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    filters = {
        "gopher_repetition": GopherRepetitionFilter(),
        "gopher_quality": GopherQualityFilter(),
        "c4_quality": C4QualityFilter(filter_no_terminal_punct=False),
        "fineweb_quality": FineWebQualityFilter(),
    }

    def verdict(kind: str, text: str) -> str | None:
        result = filters[kind].filter(Document(text=text, id=""))
        return None if result is True else str(result[1])

    def keeps(text: str) -> bool:
        document = Document(text=text, id="")
        return all(each.filter(document) is True for each in filters.values())

    return keeps, verdict, {package: version(package) for package in ("datatrove", "spacy")}


def our_patterns() -> dict[str, str]:
    from easyllm.corpus.clean import c4, text

    return {"word": text.WORD.pattern, "sentence_break": c4.SENTENCE_BREAK.pattern}


def give_our_words(patterns: dict[str, str]) -> None:
    """Replaces spaCy's words and sentences with ours."""
    import re

    from datatrove.utils import word_tokenizers

    word, sentence_break = (re.compile(patterns[x]) for x in ("word", "sentence_break"))

    class Tokenizer:
        word_tokenize = staticmethod(word.findall)

        @staticmethod
        def span_tokenize(text: str) -> list[tuple[int, int]]:
            ends = [m.end() for m in sentence_break.finditer(text)]
            return list(zip([0, *ends], [*ends, len(text)], strict=True))

    word_tokenizers.load_word_tokenizer = lambda _language: Tokenizer


def read_texts(data: Path) -> list[str]:
    """Returns the `text` of each line of a file, or 300 generated texts if it does not exist."""
    if data.is_file():
        with data.open(encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]
    return [generated_text(random.Random(seed)) for seed in range(300)]


def generated_text(random: random.Random) -> str:
    """Generates paragraphs of made-up words with a skewed distribution; some lines are repeated."""
    syllables = [
        "ka",
        "lo",
        "mi",
        "re",
        "tu",
        "san",
        "vel",
        "dor",
        "ni",
        "pa",
        "que",
        "sti",
        "the",
        "of",
        "and",
        "to",
    ]
    words = ["".join(random.choices(syllables, k=random.randint(1, 4))) for _ in range(2000)]
    weights = [1 / rank for rank in range(1, 2001)]
    lines = []
    for _ in range(random.randint(2, 30)):
        sentences = [
            " ".join(random.choices(words, weights, k=random.randint(4, 25))).capitalize() + "."
            for _ in range(random.randint(1, 6))
        ]
        lines.append(" ".join(sentences))
        lines += lines[:1] * (random.random() < 0.02)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
