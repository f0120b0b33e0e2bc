"""Which texts a guide accepts, read byte by byte through the masks that the engine uses."""

import json

import jsonschema
import torch

from easyllm.engine.guide_spec import GuideSpec


def allowed(mask):
    """Returns the ids that a token mask allows."""
    words = mask.mask().to(torch.int64)
    bits = (words[:, None] >> torch.arange(32)) & 1
    return set(bits.flatten().nonzero().flatten().tolist())


class GuideTexts:
    """Accepted texts of guides, for a tokenizer with a token for every byte of the texts."""

    def __init__(self, guides, tokenizer, eos):
        self.guides, self.eos = guides, eos
        ids = range(tokenizer.vocab_size)
        found = {tokenizer.token_bytes(i): i for i in ids if i not in tokenizer.special_ids}
        self.byte_ids = {value[0]: i for value, i in found.items() if len(value) == 1}

    def accepts(self, text, **spec):
        """Whether a guide, given as fields of `GuideSpec`, accepts the whole text."""
        return self.reads(self.guides.compile(GuideSpec(**spec)), text)

    def reads(self, source, text):
        """Whether a mask source accepts the whole text."""
        mask = source.start()
        for value in text.encode():
            if self.byte_ids[value] not in allowed(mask):
                return False
            mask.advance(self.byte_ids[value])
        return self.eos in allowed(mask)

    def accepts_value(self, value, schema, compact=True):
        """Whether the guide of a schema accepts a value as `json.dumps` writes it."""
        separators = (",", ":") if compact else (", ", ": ")
        text = json.dumps(value, ensure_ascii=False, separators=separators)
        return self.accepts(text, json_schema=schema)


def is_valid(text, schema):
    """Whether a text is JSON that satisfies a schema, formats included."""
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    value = json.loads(text)
    return kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(value)
