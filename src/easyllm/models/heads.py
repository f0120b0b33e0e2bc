"""Classification and reward heads, and untying a tied output head."""

from dataclasses import replace

import torch

from easyllm.checkpoint.keymap import KeyMap, Rename
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear

SCORE = "score.weight"
"""Parameter name of the classification head, here and in every Hugging Face family."""


def with_score(keymap: KeyMap) -> KeyMap:
    """Returns a family's key map extended with the classification head."""
    return replace(keymap, rules=[Rename(SCORE, SCORE), *keymap.rules])


def to_classifier(model: Decoder, num_labels: int, *, seed: int = 0) -> Decoder:
    """Replaces a language model's output projection with a fresh classification head, in place.

    The head is initialised from N(0, 1/(D+1)) (Stiennon et al. 2020, arXiv 2009.01325,
    appendix B.1), so that the scores of normalised hidden states start near N(0, 1).

    Args:
        model: the language model to change.
        num_labels: number of classes; 1 for a reward model.
        seed: seed of the head's initial weights.

    Returns:
        `model` itself.
    """
    config = model.config.changed(num_labels=num_labels)
    head = Linear(config.hidden_size, num_labels)
    generator = torch.Generator().manual_seed(seed)
    head.reset_parameters((config.hidden_size + 1) ** -0.5, generator)
    model.config, model.lm_head = config, None
    model.score = head.to(model.device, model.dtype).requires_grad_(False)
    return model
