"""Heads of labels: classes, or one reward."""

from dataclasses import replace

import torch

from easyllm.checkpoint.keymap import KeyMap, Rename
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear

SCORE = "score.weight"
"""Its name here and in every family of Hugging Face's."""


def with_score(keymap: KeyMap) -> KeyMap:
    """A family's key map that knows the head of labels, too."""
    return replace(keymap, rules=[Rename(SCORE, SCORE), *keymap.rules])


def to_classifier(model: Decoder, num_labels: int, *, seed: int = 0) -> Decoder:
    """Gives a language model a fresh head of labels in place of its output projection.

    The head starts at N(0, 1/(D+1)) (Stiennon et al. 2020, arXiv 2009.01325, appendix B.1), so that scores of
    normalised hidden states start near N(0, 1).
    """
    config = model.config.changed(num_labels=num_labels)
    head = Linear(config.hidden_size, num_labels)
    generator = torch.Generator().manual_seed(seed)
    head.reset_parameters((config.hidden_size + 1) ** -0.5, generator)
    model.config, model.lm_head = config, None
    model.score = head.to(model.device, model.dtype).requires_grad_(False)
    return model


def untie_head(model: Decoder) -> Decoder:
    """Gives a model whose head is its embedding a head of its own, with the same values."""
    if model.lm_head is None and model.score is None:
        head = Linear(model.config.hidden_size, model.config.vocab_size)
        storage = model.embed_tokens.storage
        if storage.format == "dense":
            head.weight = torch.nn.Parameter(storage.dense().detach().clone(), requires_grad=False)
        else:
            head.store(storage)  # read only, so one copy serves both
        model.lm_head = head.train(model.training)
        model.config = model.config.changed(tie_embeddings=False)
    return model
