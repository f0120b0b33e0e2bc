"""Writes the preference pairs of the recipes `rm-en`, `dpo-en` and `dpo-zh`.

    python tools/pair_data.py          # writes recipes/data/pairs_*.jsonl, the same for a seed

Every prompt is a question; the chosen response is a right and polite answer, the rejected one has
a fault: it is rude, evasive, rambling, shouted, or the answer to another question. Held-out pairs
have other subjects and other phrasings of the faults. Half of the rejected responses are shorter
than the chosen one and half are longer, so that length does not tell the sides apart.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pair_tables
import zh_tables
from json_lines import write

DATA = Path(__file__).parents[1] / "recipes" / "data"
HELDOUT = 5
"""One of this many subjects is held out."""
MOST = 90
"""Most subjects of a language."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its subject, its right answer and the key word of that."""

    subject: str
    question: str
    answer: str
    key: str


def english() -> list[Asked]:
    """Returns the questions in English."""
    found = [
        Asked(a, f"What is the capital of {a}?", f"The capital of {a} is {b}.", b)
        for a, b in _twos(pair_tables.CAPITALS)
    ]
    found += [
        Asked(a, f"What is the opposite of {a}?", f"The opposite of {a} is {b}.", b)
        for a, b in _twos(pair_tables.OPPOSITES)
    ]
    found += [
        Asked(a, f"What does {a} eat?", f"{a[0].upper()}{a[1:]} eats {b}.", b)
        for a, b in _twos(pair_tables.ANIMALS)
    ]
    lines = (line.split("|") for line in pair_tables.HELP.strip().splitlines())
    return found + [Asked(a, f"How can I {a}?", b, b.split(",")[0].rstrip(".")) for a, b in lines]


def chinese() -> list[Asked]:
    """Returns the questions in Chinese."""
    found = [
        Asked(row[0], f"{row[0]}的首都是哪里？", f"{row[0]}的首都是{row[1]}。", row[1])
        for row in zh_tables.rows(zh_tables.COUNTRIES)
    ]
    found += [
        Asked(row[0], f"{row[0]}省的省会是哪里？", f"{row[0]}省的省会是{row[2]}。", row[2])
        for row in zh_tables.rows(zh_tables.PROVINCES)
    ]
    found += [
        Asked(row[0], f"{row[0]}吃什么？", f"{row[0]}主要吃{row[2]}。", row[2])
        for row in zh_tables.rows(zh_tables.ANIMALS)
    ]
    return found + [
        Asked(row[0], f"{row[0]}是什么意思？", f"{row[0]}的意思是{row[1]}。", row[0])
        for row in zh_tables.rows(zh_tables.IDIOMS)
    ]


def pairs(
    asked: Sequence[Asked], faults: pair_tables.Faults, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns the pairs to train on and the held-out ones, three faults a question."""
    rng = random.Random(seed)
    train, heldout = list[dict[str, str]](), list[dict[str, str]]()
    counts = {False: 0, True: 0}  # of pairs to train on, and of held-out ones
    for number, item in enumerate(rng.sample(list(asked), min(MOST, len(asked)))):
        is_held = number % HELDOUT == 0
        used = set[str]()
        while len(used) < 3:
            counts[is_held] += 1
            found = responses(item, asked, faults, is_held, rng)
            wanted = [
                (kind, text)
                for kind, text in found
                if kind not in used and (len(text) < len(item.answer)) == (counts[is_held] % 2 == 0)
            ]
            kind = rng.choice(sorted({kind for kind, _ in wanted}))
            rejected = rng.choice([text for name, text in wanted if name == kind])
            used.add(kind)
            row = {"id": kind, "prompt": item.question, "chosen": item.answer, "rejected": rejected}
            (heldout if is_held else train).append(row)
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def responses(
    item: Asked,
    asked: Sequence[Asked],
    faults: pair_tables.Faults,
    is_held: bool,
    rng: random.Random,
) -> list[tuple[str, str]]:
    """Returns responses with a fault, each with the name of the fault; none is as long as right."""
    values = {
        "q": item.question,
        "s": item.subject,
        "a": item.answer[:-1],
        "A": item.answer[:-1].upper(),
        "K": item.key.upper(),
    }
    found = []
    for kind, phrasings in faults.items():
        for phrasing in phrasings[is_held]:
            other = rng.choice([x.answer for x in asked if x.answer != item.answer])
            text = phrasing.format(**values, o=other)
            if len(text) != len(item.answer):
                found.append((kind, text))
    return found


def main() -> None:
    """Writes the four files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=DATA)
    options = parser.parse_args()
    languages: dict[str, tuple[Callable[[], list[Asked]], pair_tables.Faults]] = {
        "en": (english, pair_tables.FAULTS_EN),
        "zh": (chinese, pair_tables.FAULTS_ZH),
    }
    for name, (asked, faults) in languages.items():
        train, heldout = pairs(asked(), faults, options.seed)
        write(options.output / f"pairs_{name}_train.jsonl", train)
        write(options.output / f"pairs_{name}_heldout.jsonl", heldout)


def _twos(table: str) -> list[tuple[str, str]]:
    """Returns the fields of a table, two by two."""
    fields = [field for line in table.strip().splitlines() for field in line.split("|")]
    return list(zip(fields[::2], fields[1::2], strict=True))


if __name__ == "__main__":
    main()
