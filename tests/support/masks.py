"""Masks for guided decoding in tests."""

import torch


def packed(token_ids, size=320):
    """Returns a bit mask [⌈size/32⌉] int32 with the bits of these ids set."""
    words = torch.zeros(-(-size // 32), dtype=torch.int64)
    for token in token_ids:
        words[token // 32] |= 1 << (token % 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


class RuleMask:
    """A mask source that allows `rule(output_ids)`: ids, a packed mask, or None for all."""

    def __init__(self, rule):
        self.rule = rule

    def start(self):
        return _Running(self.rule)


class _Running:
    def __init__(self, rule):
        self.rule, self.output = rule, []

    def mask(self):
        found = self.rule(self.output)
        return found if found is None or isinstance(found, torch.Tensor) else packed(found)

    def advance(self, token_id):
        self.output.append(token_id)
