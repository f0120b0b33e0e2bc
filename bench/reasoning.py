"""A tiny model trained on arithmetic traces against one trained on answers alone; a vote; one row.

    python bench/reasoning.py [--steps 1000] [--seeds 2] [--record]

Sums of six digits modulo 10, one token per character. The first model learns the answer
(4+7+2+9+1+5=8), the second the sum up to each number as well (4+7+2+9+1+5=4=1=3=2=3=8). Both see
the same number of tokens, so the first sees more sums. On sums that neither has seen: accuracy of
greedy answers; and of the second model, one sample against the vote of eight at the same
temperature, item by item.
"""

import argparse
import itertools
import random
from collections.abc import Sequence

import machine
import torch

from easyllm.batches.packing import pack
from easyllm.engine import LLM
from easyllm.evaluate.metric import Outcome, mean_metric, paired_difference, score, table
from easyllm.examples.sample import Sample
from easyllm.models import load_tokenizer
from easyllm.models.families import family_of
from easyllm.nn.decoder import Decoder
from easyllm.prompt.ask import Ask, ModelAsker
from easyllm.prompt.extract import extract, same_number
from easyllm.prompt.reasoning import vote
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.objectives import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig

TOKENIZER = machine.HERE.parent / "recipes" / "data" / "arithmetic"
BATCH, RATE, SAMPLES, TEMPERATURE = 64, 2e-3, 8, 2.0
CORRECT = mean_metric("accuracy", "tests", lambda outcome: float(outcome.passed))
NUMBERS = 6
Sum = tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of the model with traces")
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    tokenizer = load_tokenizer(str(TOKENIZER))
    results = [measure(tokenizer, seed, options) for seed in range(options.seeds)]
    shape = {"steps": options.steps, "batch": BATCH, "held_out": options.held_out}
    row = machine.row("reasoning", shape=shape, samples=SAMPLES, results=results)
    machine.finish(row, "reasoning", record=options.record)


def measure(tokenizer: Tokenizer, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """Trains both models with a seed, and returns their accuracies with intervals."""
    rng = random.Random(seed)
    numbers = [tuple(rng.randrange(10) for _ in range(NUMBERS)) for _ in range(60_000)]
    every = list(dict.fromkeys(numbers))
    held, sums = every[: options.held_out], every[options.held_out :]
    traced, budget = train(tokenizer, sums, seed, steps=options.steps, trace=True)
    plain, _ = train(tokenizer, sums, seed, tokens=budget, trace=False)
    passed = {}
    for name, model in (("answers", plain), ("traces", traced)):
        passed[name] = right(tokenizer, model, held, samples=1, temperature=0.0)
    passed["one sample"] = right(tokenizer, traced, held, samples=1, temperature=TEMPERATURE)
    passed["vote"] = right(tokenizer, traced, held, samples=SAMPLES, temperature=TEMPERATURE)
    tables = {
        name: table(CORRECT, [Outcome(passed=each) for each in values])
        for name, values in passed.items()
    }
    found: dict[str, object] = {"seed": seed, "tokens": budget}
    for name, values in tables.items():
        its = score(CORRECT, values)
        found[name] = [round(each or 0.0, 4) for each in (its.value, its.low, its.high)]
    for first, second in (("answers", "traces"), ("one sample", "vote")):
        gap = paired_difference(CORRECT, tables[first], tables[second])
        found[f"{second} - {first}"] = [
            round(gap[key], 4) for key in ("difference", "low", "high", "p_value")
        ]
    return found


def text_of(numbers: Sum, *, trace: bool) -> tuple[str, str]:
    """Returns the question and the answer, with its steps or without."""
    sums = list(itertools.accumulate(numbers, lambda one, other: (one + other) % 10))
    return f"{'+'.join(map(str, numbers))}=", "=".join(map(str, sums if trace else sums[-1:]))


def train(
    tokenizer: Tokenizer,
    sums: Sequence[Sum],
    seed: int,
    *,
    trace: bool,
    steps: int | None = None,
    tokens: int | None = None,
) -> tuple[Decoder, int]:
    """Returns a model trained for a number of steps or tokens, and the number of its tokens."""
    model = Decoder(
        family_of("llama").read_config(
            {
                "model_type": "llama",
                "vocab_size": tokenizer.vocab_size,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "hidden_size": 128,
                "intermediate_size": 344,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
                "eos_token_id": tokenizer.eos_id,
            }
        )
    )
    model.reset_parameters(generator=torch.Generator().manual_seed(seed))
    model.requires_grad_(True).train()
    optimizer = MasterOptimizer(
        dict(model.named_parameters()), AdamWConfig(learning_rate=RATE, betas=(0.9, 0.98))
    )
    objective, rng, seen, step = LanguageModel(), random.Random(seed), 0, 0
    assert tokenizer.eos_id is not None, "the tokenizer has an EOS token"
    while step < steps if steps is not None else seen < (tokens or 0):
        samples = []
        for _ in range(BATCH):
            question, answer = text_of(rng.choice(sums), trace=trace)
            ids = tokenizer.encode(question + answer, special_tokens=False)
            start = len(tokenizer.encode(question, special_tokens=False))
            mask = [place >= start for place in range(len(ids) + 1)]
            samples.append(Sample.from_mask([*ids, tokenizer.eos_id], mask))
        batch = pack(samples)
        done = (step / steps) if steps is not None else seen / (tokens or 1)
        loss = objective.loss(model, batch)
        (loss.sum / loss.num_tokens).backward()
        optimizer.step(min(1.0, (step + 1) / 50) * max(0.05, 1 - done))
        seen, step = seen + len(batch.token_ids), step + 1
    return model.requires_grad_(False).eval(), seen


def right(
    tokenizer: Tokenizer, model: Decoder, held: Sequence[Sum], *, samples: int, temperature: float
) -> list[bool]:
    """Returns whether the answer to each sum is right, by vote if there are several samples."""
    llm = LLM(model=model, tokenizer=tokenizer)
    ask = ModelAsker(llm, max_tokens=24, chat=False, form="{question}", stop=("?",))
    asks = [Ask(text_of(numbers, trace=False)[0]) for numbers in held]
    answers = []
    for replies in ask(asks, n=samples, temperature=temperature):
        found = vote([(r.text, extract("number", r.text), r.tokens, r.truncated) for r in replies])
        answers.append(found.answer)
    return [
        answer is not None and same_number(answer, str(sum(numbers) % 10))
        for answer, numbers in zip(answers, held, strict=True)
    ]


if __name__ == "__main__":
    main()
