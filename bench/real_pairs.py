"""Reward models and DPO on 300 real preference pairs: held-out accuracy over folds and seeds.

    python bench/real_pairs.py [--layers 4] [--epochs 2] [--rate 5e-4] [--folds 5] [--seeds 3]
                               [--only reward] [--record]

SmolLM2 with LoRA in its last layers (`--layers`); the layers below are frozen, so their output is
computed once and every epoch starts from it. Prompts keep their last 240 characters, responses
their first 480. `reward` is a reward model in five folds: each pair is judged by the model that has
not seen it; next to it is the rule that takes the shorter (or the longer) response, whichever the
fold's training pairs prefer. `dpo` trains on 200 pairs and measures 100 others, with other pairs
and other initial adapters for each seed.
"""

import argparse
import copy
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn

from easyllm.adapters import LoRAConfig, attach
from easyllm.batches.loader import Loader
from easyllm.batches.packing import pack, split_by_tokens
from easyllm.batches.shared_prompts import share_prompts
from easyllm.examples.sample import Sample, SampleGroup
from easyllm.models import load_model, load_tokenizer
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding
from easyllm.train.data_config import PreferenceDataConfig
from easyllm.train.loop import accumulate
from easyllm.train.objectives import DPO, Objective, Reference, Reward
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig

MICRO_TOKENS, BATCH = 2048, 16
ERRORS = 3
"""Standard errors above 50% that an accuracy is compared with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=machine.SHARED / "data" / "dpo_en_demo.json")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=5e-4, help="of the reward model")
    parser.add_argument("--only", choices=["reward", "dpo"])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    start = time.perf_counter()
    rows = shortened(json.loads(options.data.read_text("utf-8"))[: options.pairs])
    base = load_model("smollm2", dtype="float32")
    objectives: dict[str, Objective] = {"reward": Reward(), "dpo": DPO()}
    groups = {
        name: prepared(objective, rows)
        for name, objective in objectives.items()
        if options.only in (None, name)
    }
    upper, groups = upper_layers(base, groups, options.layers)
    results: dict[str, Any] = {}
    if "reward" in groups:
        results["reward"] = five_fold(upper, groups["reward"], rows, options)
    if "dpo" in groups:
        results["dpo"] = dpo_seeds(upper, groups["dpo"], options)
    results["seconds"] = round(time.perf_counter() - start)
    shape = {name: getattr(options, name) for name in ("layers", "epochs", "rate")}
    shape |= {"pairs": len(rows)}
    row = machine.row("real_pairs", shape=shape, results=results)
    machine.finish(row, "real_pairs", record=options.record)


def shortened(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows with the end of each prompt and the beginning of each response."""
    return [
        {
            "prompt": "\n".join(turn["value"] for turn in row["conversations"])[-240:],
            "chosen": row["chosen"]["value"][:480],
            "rejected": row["rejected"]["value"][:480],
        }
        for row in rows
    ]


def prepared(objective: Objective, rows: list[dict[str, Any]]) -> list[SampleGroup]:
    """Returns a group of two sequences for each row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        data = PreferenceDataConfig(train=(str(path),), max_seq_len=1024)
        samples, _ = objective.prepare(data, [path], load_tokenizer("smollm2"))
    groups = [sample for sample in samples if isinstance(sample, SampleGroup)]
    assert len(groups) == len(rows), "no row was dropped"
    return groups


@torch.no_grad()
def upper_layers(
    model: Decoder, named: dict[str, list[SampleGroup]], count: int
) -> tuple[Decoder, dict[str, list[SampleGroup]]]:
    """Returns the last layers as a model whose embedding is what the layers below compute.

    Its token ids are the rows of that table; the groups are returned with these ids. Sequences of
    the objectives that are equal have the same rows.
    """
    model.untie_head()
    model.eval().requires_grad_(False)
    table, found, seen = list[torch.Tensor](), {}, dict[tuple[int, ...], list[list[int]]]()
    num_rows = 0
    for name, groups in named.items():
        found[name] = list[SampleGroup]()
        for group in groups:
            key = tuple(token for part in group.parts for token in part.token_ids)
            if key not in seen:
                token_ids, context, row_of = share_prompts(pack([group]))
                x, added = model.embed(token_ids, context), None
                for layer in list(model.layers)[:-count]:
                    x, added = layer(x, context, added)
                table.append(x if added is None else x + added)
                ids = (num_rows + row_of).tolist()
                num_rows += len(token_ids)
                first = len(group.parts[0].token_ids)
                seen[key] = [ids[:first], ids[first:]]
            parts = (
                Sample(tuple(ids), part.labels, part.extras)
                for ids, part in zip(seen[key], group.parts, strict=True)
            )
            found[name].append(SampleGroup(tuple(parts)))
    states = torch.cat(table)
    model.layers = nn.ModuleList(list(model.layers)[-count:])
    model.embed_tokens = Embedding(*states.shape)
    model.embed_tokens.weight = nn.Parameter(states, requires_grad=False)
    return model, found


def trained(
    model: Decoder,
    objective: Objective,
    groups: Sequence[SampleGroup],
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> Decoder:
    """Trains LoRA (and the head of a reward model) on some groups; returns the model."""
    model = objective.prepare_model(copy.deepcopy(model), seed=seed)
    config = LoRAConfig(rank=16, alpha=32)
    adapters = attach(model, config, seed=seed, also_trained=objective.also_trained)
    if objective.needs_reference:
        objective.reference = Reference(model, without_adapter=True)
    parameters = adapters.trained_parameters(model)
    optimizer = MasterOptimizer(parameters, AdamWConfig(learning_rate=rate))
    loader = Loader(groups, batch_size=BATCH, micro_batch_tokens=MICRO_TOKENS, seed=seed)
    steps = epochs * loader.steps_per_epoch
    model.train()
    for step in range(steps):
        accumulate(model, objective, loader.next_step())
        optimizer.clip(optimizer.grad_norm(), 1.0)
        rising = min(1.0, (step + 1) / max(1, 0.1 * steps))
        optimizer.step(rising * 0.5 * (1 + math.cos(math.pi * step / steps)))
    return model.eval()


def evaluated(model: Decoder, objective: Objective, groups: Sequence[SampleGroup]) -> Any:
    """Returns the objective's metrics on held-out groups."""
    batches = (pack(few) for few in split_by_tokens(groups, MICRO_TOKENS))
    return objective.evaluate(model, batches)


def five_fold(
    model: Decoder, groups: list[SampleGroup], rows: list[dict[str, Any]], options: Any
) -> dict[str, Any]:
    """Returns the share of pairs that a model which has not seen them puts in the right order."""
    order = list(range(len(groups)))
    random.Random(0).shuffle(order)
    right = by_length = 0.0
    shorter = [len(row["chosen"]) < len(row["rejected"]) for row in whole_rows(options)]
    for fold in range(options.folds):
        held = order[fold :: options.folds]
        others = [number for number in order if number not in set(held)]
        fitted = trained(
            model,
            objective := Reward(),
            [groups[i] for i in others],
            epochs=options.epochs,
            rate=options.rate,
            seed=fold,
        )
        found = evaluated(fitted, objective, [groups[i] for i in held])
        right += found["reward_accuracy"] * len(held)
        prefers_short = sum(shorter[i] for i in others) * 2 > len(others)
        by_length += sum(shorter[i] == prefers_short for i in held)
    bar = 0.5 + ERRORS * math.sqrt(0.25 / len(rows))
    return {
        "accuracy": round(right / len(rows), 4),
        "length_only": round(by_length / len(rows), 4),
        "bar": round(bar, 4),
        "folds": options.folds,
    }


def whole_rows(options: Any) -> list[dict[str, Any]]:
    """Returns the responses of the rows in full, for their lengths."""
    rows = json.loads(options.data.read_text("utf-8"))[: options.pairs]
    return [{side: row[side]["value"] for side in ("chosen", "rejected")} for row in rows]


def dpo_seeds(model: Decoder, groups: list[SampleGroup], options: Any) -> dict[str, Any]:
    """Returns accuracy and margin on held-out pairs after each seed's training; both start at 0."""
    accuracies, margins = list[float](), list[float]()
    for seed in range(options.seeds):
        order = list(range(len(groups)))
        random.Random(seed).shuffle(order)
        held, others = order[: len(order) // 3], order[len(order) // 3 :]
        objective = DPO()
        chosen = [groups[i] for i in others]
        fitted = trained(model, objective, chosen, epochs=options.epochs, rate=2e-4, seed=seed)
        found = evaluated(fitted, objective, [groups[i] for i in held])
        accuracies.append(round(found["reward_accuracy"], 4))
        margins.append(round(found["reward_margin"], 4))
    return {
        "accuracy": accuracies,
        "margin": margins,
        "mean_accuracy": round(statistics.mean(accuracies), 4),
        "held_out": len(groups) // 3,
    }


if __name__ == "__main__":
    main()
