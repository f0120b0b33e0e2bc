"""Tokenization: encoding, decoding, chat templates with loss masks, and streaming decoding."""

from easyllm.tokenizer.chat import ChatTemplate, EncodedChat
from easyllm.tokenizer.messages import normalise_messages
from easyllm.tokenizer.special_tokens import SpecialTokens
from easyllm.tokenizer.stream import StreamDecoder
from easyllm.tokenizer.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "EncodedChat",
    "SpecialTokens",
    "StreamDecoder",
    "Tokenizer",
    "normalise_messages",
]
