"""SmolLM2's tokenizer extended with Chinese: gain on held-out text, and cost; one JSON row.

    python bench/extend.py [--train FILE] [--held-out FILE] [--english FILE] [--text-key output]
                           [--new 8000] [--record]

Text files contain one text per line; JSON files contain rows with the text under the key. Fertility
is tokens per word, with each Han character counting as a word. Losses are those of SmolLM2 in fp32,
before any training, on the beginning of the held-out and of the English text: per old token, over
the old ids (which must not change) and over all ids; and per byte, in old and in new tokens.
"""

import argparse
from pathlib import Path
from typing import Any

import machine
from machine import SHARED

from easyllm.examples.data_file import read_rows
from easyllm.models import load_model, load_tokenizer
from easyllm.models.resize import loss_of_text, resize_embeddings
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.extend import Extension, extend_tokenizer
from easyllm.tokenizer.report import report
from easyllm.tokenizer.tokenizer import Tokenizer

LOSS_CHARACTERS = 2000


def main() -> None:
    data = SHARED / "data"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, default=data / "wmt22.generaltest2022.zh-en.src.zh")
    parser.add_argument("--held-out", type=Path, default=data / "alpaca_zh_demo_500.json")
    parser.add_argument("--english", type=Path, default=data / "wikitext2_valid.txt")
    parser.add_argument("--text-key", default="output")
    parser.add_argument("--new", type=int, default=8000)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    files = {"train": options.train, "held_out": options.held_out, "english": options.english}
    texts = {name: read(path, options.text_key) for name, path in files.items()}
    old = load_tokenizer("smollm2")
    extension = extend_tokenizer(old, texts["train"], num_new=options.new)
    row = machine.row(
        "extend",
        model="smollm2",
        new_pieces=extension.num_new,
        texts={name: {"file": files[name].name, "texts": len(texts[name])} for name in files},
        fertility=fertility(old, extension, texts),
        english_texts_with_other_ids=sum(
            old.encode(text) != extension.tokenizer.encode(text)
            for text in texts["english"]
            if text.isascii()
        ),
        losses_nats=losses(old, extension, texts),
    )
    machine.finish(row, "extend", record=options.record)


def read(path: Path, text_key: str) -> list[str]:
    """Returns the texts of a file."""
    if path.suffix in (".json", ".jsonl"):
        return [row.values[text_key] for row in read_rows(path)]
    return [line for line in path.read_text("utf-8").splitlines() if line.strip()]


def fertility(old: Tokenizer, extension: Extension, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Returns tokens per word of each text with either tokenizer."""
    found = report({"before": old, "after": extension.tokenizer}, texts).texts
    figures: dict[str, dict[str, float]] = {name: {} for name in texts}
    for text in found:
        figures[text.domain][text.tokenizer] = round(text.fertility, 4)
    return figures


def losses(old: Tokenizer, extension: Extension, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Returns the model's losses on either text before and after resizing the embeddings."""
    before = load_model("smollm2", dtype="float32")
    after = resize_embeddings(load_model("smollm2", dtype="float32"), extension.old_pieces)
    openings = {n: "\n".join(texts[n])[:LOSS_CHARACTERS] for n in ("held_out", "english")}
    return {name: losses_of(text, before, after, old, extension) for name, text in openings.items()}


def losses_of(
    text: str, before: Decoder, after: Decoder, old: Tokenizer, extension: Extension
) -> dict[str, float]:
    ids, new_ids = old.encode(text), extension.tokenizer.encode(text)
    size = len(text.encode("utf-8"))
    first = min(extension.old_pieces)
    figures = {
        "before": loss_of_text(before, ids),
        "over_old_ids": loss_of_text(after, ids, num_ids=first),
        "over_all_ids": loss_of_text(after, ids),
        "per_byte_before": loss_of_text(before, ids) * (len(ids) - 1) / size,
        "per_byte_after": loss_of_text(after, new_ids) * (len(new_ids) - 1) / size,
    }
    return {name: round(value, 7) for name, value in figures.items()}


if __name__ == "__main__":
    main()
