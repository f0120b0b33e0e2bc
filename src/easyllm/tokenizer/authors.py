"""Tokenizers and chat formats of Baichuan and ChatGLM, as their authors' code has them.

Their folders contain a SentencePiece model, and Python code (never run here) that adds tokens
around a text, names further tokens, and formats conversations. What that code does is stated here,
by the class that `tokenizer_config.json` names:

BaichuanTokenizer  tokenizer.model  text as the model has it; turns begin with the role tokens that
                                    `generation_config.json` numbers
ChatGLMTokenizer   ice_text.model   whitespace as `<n>`, `<|tab|>`, `<|blank_2|>` ...; `[gMASK]` and
                                    `<sop>` after a text; turns as `[Round 0]`, 问 and 答
ChatGLMTokenizer   tokenizer.model  `[gMASK]` and `sop` before a text; turns as `[Round 1]`, or with
                                    role tokens (ChatGLM3)
ChatGLM4Tokenizer  tokenizer.model  a vocabulary of tiktoken; `[gMASK]` and `<sop>` before a text
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers
from tokenizers.processors import TemplateProcessing

from easyllm.core.json_types import JsonMapping
from easyllm.tokenizer.sentencepiece import Piece, PieceType, SentencePieceModel

ICE_FILE = "ice_text.model"
GENERATION_FILE = "generation_config.json"
CHATGLM, CHATGLM4 = "ChatGLMTokenizer", "ChatGLM4Tokenizer"
BAICHUAN = ("BaichuanTokenizer", "BaiChuanTokenizer")
MAX_BLANKS = 80
"""Longest run of spaces that ChatGLM-6B has a token for."""
_MASKS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

_BAICHUAN_CHAT = """\
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ USER + message['content'] }}
{%- elif message['role'] == 'assistant' %}{{ ASSISTANT + message['content'] }}
{%- if loop.last %}{{ eos_token }}{% endif %}
{%- elif not loop.first %}{{ raise_exception('role ' + message['role'] + ' is not supported') }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ ASSISTANT }}{% endif %}"""
_CHATGLM_CHAT = """\
{%- for message in messages %}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
{{- raise_exception('ChatGLM has turns of user and assistant in alternation') }}
{%- elif message['role'] == 'user' and messages | length <= 2 %}{{ message['content'] }}
{%- elif message['role'] == 'user' %}
{{- '[Round ' ~ loop.index0 // 2 ~ ']\\n问：' ~ message['content'] ~ '\\n答：' }}
{%- elif loop.last %}{{ '[gMASK]<sop>' ~ message['content'] ~ eos_token }}
{%- else %}{{ message['content'] ~ '\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '[gMASK]<sop>' }}{% endif %}"""
_CHATGLM2_CHAT = """\
{{- '[gMASK]sop' }}
{%- for message in messages %}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
{{- raise_exception('ChatGLM2 has turns of user and assistant in alternation') }}
{%- elif message['role'] == 'user' %}
{{- '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\\n\\n问：' ~ message['content'] ~ '\\n\\n答：' }}
{%- elif loop.last %}{{ message['content'] ~ eos_token }}
{%- else %}{{ message['content'] ~ '\\n\\n' }}
{%- endif %}{% endfor %}"""
_CHATGLM3_CHAT = """\
{{- '[gMASK]sop' }}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n ' + message['content'] }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}
{%- elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"""


@dataclass(frozen=True, slots=True)
class AuthorsClass:
    """A tokenizer class of a family's authors.

    Attributes:
        name: the class.
        file: the name of the SentencePiece file.
    """

    name: str
    file: str

    @property
    def is_ice(self) -> bool:
        """Whether it is the class of ChatGLM-6B."""
        return self.name == CHATGLM and self.file == ICE_FILE

    @property
    def is_second(self) -> bool:
        """Whether it is the class of ChatGLM2 and 3."""
        return self.name == CHATGLM and self.file != ICE_FILE

    def special(self) -> dict[str, str]:
        """Returns the special tokens by role that the class gives if no file does."""
        if self.is_ice:
            return {"bos": "<sop>", "eos": "<eop>", "pad": "<pad>", "unk": "<unk>"}
        if self.is_second:
            return {"bos": "sop", "eos": "</s>", "pad": "<unk>", "unk": "<unk>"}
        return {}

    def prepared(self, model: SentencePieceModel, config: JsonMapping) -> SentencePieceModel:
        """Returns the model with the tokens that the class appends to its vocabulary.

        Args:
            model: the contents of the file.
            config: `tokenizer_config.json`, which names the role tokens of ChatGLM3.
        """
        if not self.is_second:
            return model
        names = [*_MASKS, *(_ROLES if _ROLES[1] in json.dumps(config) else ())]
        known = {piece.text for piece in model.pieces}
        more = [Piece(name, 0.0, PieceType.CONTROL) for name in names if name not in known]
        return replace(model, pieces=(*model.pieces, *more))

    def finish(self, backend: Backend) -> None:
        """Makes a backend treat texts as the class does."""
        if self.is_ice:
            backend.normalizer = normalizers.Sequence([*_blank_rules(), backend.normalizer])
            backend.decoder = decoders.Sequence([backend.decoder, *_blank_decoders()])
            _surround(backend, after=("[gMASK]", "<sop>"))
        elif self.is_second:
            _surround(backend, before=("[gMASK]", "sop"))
        elif self.name == CHATGLM4:
            _surround(backend, before=("[gMASK]", "<sop>"))

    def template(self, folder: Path, backend: Backend) -> str | None:
        """Returns the chat template of the family; None for a model without one."""
        if self.is_ice:
            return _CHATGLM_CHAT
        if self.is_second:
            known = backend.token_to_id(_ROLES[1]) is not None
            return _CHATGLM3_CHAT if known else _CHATGLM2_CHAT
        if self.name in BAICHUAN:
            return _baichuan_template(folder, backend)
        return None


def _blank_rules() -> list[normalizers.Replace]:
    """Returns the rules that replace whitespace by ChatGLM-6B's tokens, the longest run first."""
    rules = [normalizers.Replace("\n", "<n>"), normalizers.Replace("\t", "<|tab|>")]
    counts = range(MAX_BLANKS, 1, -1)
    return rules + [normalizers.Replace(" " * n, f"<|blank_{n}|>") for n in counts]


def _blank_decoders() -> list[decoders.Replace]:
    rules = [decoders.Replace("<n>", "\n"), decoders.Replace("<|tab|>", "\t")]
    counts = range(2, MAX_BLANKS + 1)
    return rules + [decoders.Replace(f"<|blank_{n}|>", " " * n) for n in counts]


def _surround(
    backend: Backend, *, before: tuple[str, ...] = (), after: tuple[str, ...] = ()
) -> None:
    """Makes encoding put tokens before and after a text, if the vocabulary has all of them."""
    ids = [(token, backend.token_to_id(token)) for token in (*before, *after)]
    if all(index is not None for _, index in ids):
        backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=ids
        )


def _baichuan_template(folder: Path, backend: Backend) -> str | None:
    """Returns Baichuan's template with the role tokens that `generation_config.json` numbers."""
    file = folder / GENERATION_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return None  # reported where the model's configuration is read
    ids = [values.get(f"{role}_token_id") for role in ("user", "assistant")]
    tokens = [backend.id_to_token(i) if isinstance(i, int) else None for i in ids]
    if None in tokens:
        return None
    user, assistant = (json.dumps(token) for token in tokens)
    return _BAICHUAN_CHAT.replace("USER", user).replace("ASSISTANT", assistant)


__all__ = ["ICE_FILE", "AuthorsClass"]
