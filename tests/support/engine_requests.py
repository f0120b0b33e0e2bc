"""Requests of many lengths and options, and what an engine generates for them."""

import torch

from easyllm.engine import Completion, Request, SamplingParams
from easyllm.nn.config import AttentionConfig, LinearAttentionConfig
from easyllm.nn.position_config import Rope
from tiny_models import build_tiny

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, 320, (n,), generator=generator).tolist()) for n in lengths]


def results(engine, requests):
    """Returns the completions of each request as a list."""
    done = {request.id: Completion() for request in requests}
    for event in engine.run(requests):
        done[event.request_id].take(event)
    return [[done[r.id], *done[r.id].others] for r in requests]


def ids_of(completions):
    return [[c.token_ids for c in several] for several in completions]


MIXED = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.8, "top_k": 30, "seed": 1},
    {"temperature": 1.1, "top_p": 0.8, "min_p": 0.01, "seed": 2, "n": 2},
    {"temperature": 1.0, "typical_p": 0.7, "seed": 3, "logprobs": 2},
    {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "min_tokens": 3},
    {"temperature": 0, "no_repeat_ngram_size": 2, "logit_bias": {5: 4.0, 9: -100.0}},
    {"temperature": 0, "prompt_logprobs": 1},
]


def mixed_requests(count, longest=90, more=0):
    lengths = [1 + (37 * i) % longest for i in range(count)]
    return [
        Request(
            prompt_ids=prompt,
            params=SamplingParams(**{"max_tokens": 4 + i % 17 + more} | MIXED[i % len(MIXED)]),
        )
        for i, prompt in enumerate(prompts_of(lengths))
    ]


def layered(*mixers):
    """Returns the tiny model with other mixers, in fp64."""
    model = build_tiny(seed=3)
    layers = tuple(model.config.layers[0].model_copy(update={"mixer": mixer}) for mixer in mixers)
    other = type(model)(model.config.changed(layers=layers)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        torch.nn.init.uniform_(parameter, -0.4, 0.6, generator=generator)
    return other.requires_grad_(False).eval()


SOFTMAX = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


KINDS = {
    "windows": [AttentionConfig(**SOFTMAX, window=w) for w in (5, 9)],
    "one window": [AttentionConfig(**SOFTMAX, window=5), AttentionConfig(**SOFTMAX)],
    "sinks": [AttentionConfig(**SOFTMAX, window=6, num_sinks=2)] * 2,
    "linear": [LinearAttentionConfig(num_heads=2, head_dim=16)] * 2,
    "linear and softmax": [
        LinearAttentionConfig(num_heads=2, head_dim=16, position=Rope()),
        AttentionConfig(**SOFTMAX),
    ],
}
