"""The tokens that encoding adds at the start and at the end of a text."""

from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing


def add_bos_eos(backend: Backend, *, bos: str | None, eos: str | None) -> None:
    """Makes encoding prepend `bos` and append `eos`, where they are not None."""
    if bos or eos:
        around = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
        backend.post_processor = TemplateProcessing(single=around, special_tokens=ids)
