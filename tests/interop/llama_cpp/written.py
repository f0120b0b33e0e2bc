"""GGUF files of every type, written here, in llama.cpp: greedy tokens, and KL on a text.

llama.cpp names a token's most likely candidates only; KL is that of the distribution over them and
all other tokens together, which is at most the true one.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from figures import Figures
from random_llama import random_llama

from easyllm.engine import LLM, SamplingParams
from easyllm.models import load_model, load_tokenizer
from easyllm.models.gguf_export import save_gguf
from easyllm.nn import Decoder
from easyllm.pipeline.calibration import calibration
from easyllm.pipeline.quantize_price import load_quantized
from easyllm.quant.calibrate import importance_matrix

NEAR_TIE = 0.1  # nats between two tokens that either program may take, or more: see `check`
TOKENS, CANDIDATES, PIECE = 512, 40, 64
MEAN_KL = 0.01
PROMPTS = (
    "The capital of France is",
    "1 2 3 4 5 6",
    "def add(a, b):\n    return",
    "Once upon a time",
    "The largest planet in the solar system",
)


def prepared(model: Decoder, tokenizer: Any, path: Path, type: str, *, weighed: bool) -> Path:
    """Writes a file, its rounding errors weighed by calibration text or not."""
    importance = None
    if weighed:
        found = calibration(tokenizer, count=8, length=128)
        importance = importance_matrix(model, found.sequences)
    save_gguf(model, path, type=type, tokenizer=tokenizer, importance=importance, replace=True)
    return path


def wide_model(tokenizer: Any) -> Decoder:
    """Returns a random Llama whose widths are multiples of 256, as K-quants need.

    llama.cpp reports no probabilities of a token that ends within a character: such tokens have an
    embedding of zero here, hence never the largest logit.
    """
    model = random_llama(
        std=0.06,
        vocab_size=tokenizer.vocab_size,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    for token in range(tokenizer.vocab_size):
        if "\ufffd" in tokenizer.decode([token]):
            model.embed_tokens.weight[token] = 0
    return model


def check(
    figures: Figures,
    name: str,
    path: Path,
    llama: Any,
    *,
    equal: bool,
    text: Sequence[int],
    prompts: Sequence[str],
) -> None:
    """Compares a file that is loaded here with a server that runs it.

    llama.cpp rounds activations to 8 bits in each product with a quantized weight, which moves the
    gap between two tokens by up to 0.9 nats from exact arithmetic with the same weights. Rounding
    them the same way here brings the two hardly closer: differences in the last bits of sums flip
    roundings. So the first different token may be as far apart as llama.cpp is from exact
    arithmetic on the text; on files whose products are exact, as near as `NEAR_TIE`.

    Args:
        equal: whether all greedy tokens must be the same; otherwise up to a near tie.
        text: token ids to compare distributions on.
    """
    model, tokenizer = load_quantized(path), load_tokenizer(path)
    exact = load_model(path, dtype="float32")
    answers = candidates(llama, text)
    kl, _ = distances(model, answers, text)
    exact_kl, exact_gap = distances(exact, answers, text)
    tie = max(NEAR_TIE, exact_gap)
    print(f"  {name}: exact arithmetic: mean KL {exact_kl:.1e}, gaps up to {exact_gap:.2f} nats")
    llm = LLM(model=model, tokenizer=tokenizer, max_running=1, cache_dtype="float32")
    wrong = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        steps = llama.greedy(ids, 64)
        params = SamplingParams(temperature=0, max_tokens=64)
        (found,) = llm.generate([ids], params)
        ours = [token for token in found.token_ids if token not in model.config.eos_token_ids]
        # llama.cpp is asked to continue after an end token, which it bans
        steps = steps[: len(ours)]
        theirs = [step["id"] for step in steps]
        if equal:
            wrong += [] if ours == theirs else [f"{prompt!r}: {ours[:8]} {theirs[:8]}"]
        elif (problem := parted(model, ids, ours, steps, tie)) is not None:
            wrong.append(f"{prompt!r}: {problem}")
    figures.equal(f"{name}: greedy tokens", wrong, [])
    figures.at_most(f"{name}: mean KL", kl, MEAN_KL)


@torch.no_grad()
def parted(
    model: Decoder,
    ids: Sequence[int],
    ours: Sequence[int],
    steps: Sequence[Mapping[str, Any]],
    tie: float,
) -> str | None:
    """Returns what is wrong at the first different token; None if both are within `tie` nats."""
    for i, (mine, step) in enumerate(zip(ours, steps, strict=True)):
        if mine == step["id"]:
            continue
        row = model.logits([*ids, *ours[:i]])[-1].log_softmax(-1)
        here = float(row.max() - row[step["id"]])
        theirs = {each["id"]: each["logprob"] for each in step["top_logprobs"]}
        there = max(theirs.values()) - theirs.get(mine, -math.inf)
        print(f"    token {i}: {here:.3f} nats apart here, {there:.3f} in llama.cpp")
        return None if max(here, there) <= tie else f"token {i}: {here:.3f}, {there:.3f} nats"
    return None


def candidates(llama: Any, text: Sequence[int]) -> list[list[dict[str, Any]]]:
    """Returns llama.cpp's most likely tokens after each token of a text, in pieces."""
    return [
        llama.candidates(list(text[first : n + 1]), CANDIDATES)
        for first in range(0, len(text), PIECE)
        for n in range(first, min(first + PIECE, len(text)))
    ]


@torch.no_grad()
def distances(
    model: Decoder, answers: Sequence[Sequence[Mapping[str, Any]]], text: Sequence[int]
) -> tuple[float, float]:
    """Returns how far llama.cpp's answers are from a model.

    Returns:
        The mean KL(llama.cpp ‖ model), and the largest difference of the gaps between llama.cpp's
        two most likely tokens, in nats.
    """
    pieces = (list(text[first : first + PIECE]) for first in range(0, len(text), PIECE))
    rows = torch.cat([model.logits(part).double().log_softmax(-1) for part in pieces])
    kl, gaps = 0.0, []
    for row, top in zip(rows, answers, strict=True):
        theirs = torch.tensor([each["logprob"] for each in top], dtype=torch.float64)
        ours = row[torch.tensor([each["id"] for each in top])]
        gaps.append(float(((theirs[0] - theirs[1]) - (ours[0] - ours[1])).abs()))
        rest = [(-torch.expm1(torch.logsumexp(p, 0))).clamp(min=1e-12) for p in (theirs, ours)]
        p = torch.cat([theirs.exp(), rest[0][None]])
        q = torch.cat([ours.exp(), rest[1][None]])
        kl += float((p * (p / q).log()).sum())
    return kl / len(text), max(gaps)


__all__ = ["CANDIDATES", "PROMPTS", "TOKENS", "check", "prepared", "wide_model"]
