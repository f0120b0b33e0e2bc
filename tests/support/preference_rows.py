"""Rows of preference data for tests, and batches of them for a tiny model."""

import json

import torch

from easyllm.batches.packing import pack
from easyllm.examples.prepare import Encoded
from easyllm.examples.rankings import EncodedRanking
from easyllm.examples.sample import Sample, SampleGroup
from easyllm.train.objectives.pairs import group_of

PAIRS = [
    {"prompt": "What colour is the sky?", "chosen": "It is blue.", "rejected": "Go away!"},
    {"prompt": "Name a fox.", "chosen": "The quick brown fox.", "rejected": "No idea at all."},
    {"prompt": "你好", "chosen": "你好，世界", "rejected": "hello"},
    {"prompt": "How many dogs?", "chosen": "One lazy dog.", "rejected": "0123456789"},
    {"prompt": "Which model?", "chosen": "A language model.", "rejected": "What?"},
    {"prompt": "Hi", "chosen": "Good morning.", "rejected": "user assistant system question"},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def random_ids(length, generator, vocab=320):
    return torch.randint(3, vocab, (length,), generator=generator).tolist()


def random_group(prompt, *responses, seed=0, whole=False):
    """A group of responses of the given lengths to one prompt, best first.

    With `whole`, every token is an input, and the last one has a label, as for reward models.
    """
    generator = torch.Generator().manual_seed(seed)
    start = random_ids(prompt, generator)
    encoded = [
        Encoded("row", [*start, *random_ids(n, generator)], [False] * prompt + [True] * n)
        for n in responses
    ]
    ranking = EncodedRanking(tuple(encoded), tuple(range(len(encoded))), prompt)
    samples = [whole_sample(e) if whole else e.sample() for e in encoded]
    return group_of(ranking, samples)


def whole_sample(encoded):
    labels = (-100,) * (len(encoded.token_ids) - 1) + (0,)
    return Sample(tuple(encoded.token_ids), labels)


def random_batch(*shapes, whole=False):
    """A batch of groups, given as (prompt length, response lengths ...)."""
    groups = [random_group(*shape, seed=i, whole=whole) for i, shape in enumerate(shapes)]
    return pack(groups)


__all__ = ["PAIRS", "SampleGroup", "random_batch", "random_group", "random_ids", "write_rows"]
