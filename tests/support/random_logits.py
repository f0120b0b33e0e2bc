"""An engine whose logits are random: the hardest case for a guide."""

import torch

from easyllm.engine import Engine, EngineConfig
from tiny_models import build_tiny


class RandomRunner:
    """Rows of logits from a fixed table, in an order that depends on all tokens of a sequence.

    Args:
        vocab_size: number of ids.
        favoured: ids that get `bonus`, such as those that end texts and lists.
    """

    def __init__(self, vocab_size, favoured=(), bonus=3.0, size=257):
        generator = torch.Generator().manual_seed(7)
        self.table = torch.randn(size, vocab_size, generator=generator)
        self.table[:, list(favoured)] += bonus

    def run(self, step):
        rows = []
        for piece in step.pieces:
            end = piece.start + len(piece.token_ids)
            for at in range(end - piece.num_logit_rows, end):
                token = piece.token_ids[at - piece.start]
                rows.append(
                    (7919 * at + 104_729 * token + 31 * piece.sequence_id) % len(self.table)
                )
        return self.table[rows]


def random_engine(tokenizer, *, vocab_size=None, favoured=(), bonus=3.0, drafter=None, **options):
    """Returns an engine for this tokenizer; the model itself is never run."""
    size = vocab_size or tokenizer.vocab_size
    eos = tokenizer.eos_id
    model = build_tiny(
        vocab_size=size, eos_token_id=eos, hidden_size=32, max_position_embeddings=1024
    )
    runner = RandomRunner(size, favoured, bonus)
    config = EngineConfig(num_pages=64 * 64, max_running=64, **options)
    return Engine(model, tokenizer, config, runner=runner, drafter=drafter)


def closing_ids(tokenizer):
    """Returns the ids of tokens with a quote or closing bracket, and EOS."""
    marks = b'"}]'
    ids = range(tokenizer.vocab_size)
    found = [i for i in ids if any(mark in (tokenizer.token_bytes(i) or b"") for mark in marks)]
    return [*found, tokenizer.eos_id]
