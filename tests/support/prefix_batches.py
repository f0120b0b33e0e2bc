"""Batches whose sequences begin alike, and what a loss computes of them."""

import torch

from easyllm.batches.packing import pack
from easyllm.examples.sample import Sample
from easyllm.train.objectives import LanguageModel

PREFIX = 9


def batch_of(vocab, *, labelled_prefix=True, common=PREFIX):
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(vocab, (common,), generator=generator).tolist()
    samples = []
    for n, length in enumerate((7, 1, 15, 4)):
        own = torch.randint(vocab, (length,), generator=generator).tolist()
        ids = [*first, n, *own]  # no two begin alike after the prefix
        labels = [*ids[1:], 0]
        labels[: 0 if labelled_prefix else common] = [] if labelled_prefix else [-100] * common
        samples.append(Sample(tuple(ids), tuple(labels)))
    return pack(samples)


def loss_gradients_and_rows(model, batch):
    rows = []
    hook = model.embed_tokens.register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    model.zero_grad(set_to_none=True)
    out = LanguageModel().loss(model, batch)
    out.sum.backward()
    hook.remove()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return out, [gradient.clone() for gradient in gradients], rows
