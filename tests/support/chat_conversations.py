"""Conversations, and chat templates that render them."""

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from easyllm.tokenizer import SpecialTokens, Tokenizer
from easyllm.tokenizer.template import compile_template

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def chat(*turns):
    """Returns a conversation of (role, content) pairs, or of alternating user and assistant."""
    pairs = [
        t if isinstance(t, tuple) else ((USER, ASSISTANT)[i % 2], t) for i, t in enumerate(turns)
    ]
    return [{"role": role, "content": content} for role, content in pairs]


def render(source, **variables):
    given = {"messages": chat("hi"), "tools": None, "add_generation_prompt": False}
    return compile_template(source)(**(given | variables))


def with_template(tokenizer, source, *special, eos="<|im_end|>"):
    """Returns a copy of a tokenizer with another template and additional special tokens."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return Tokenizer(backend, SpecialTokens(bos="<|im_start|>", eos=eos), chat_template=source)


def trained(tokenizer, messages, **options):
    """Returns the texts of the trained runs of tokens."""
    encoded = tokenizer.encode_chat(messages, with_mask=True, **options)
    runs, before = [], False
    for token, on in zip(encoded.token_ids, encoded.mask, strict=True):
        if on:
            runs.extend([] if before else [[]])
            runs[-1].append(token)
        before = on
    return [tokenizer.decode(run, skip_special=False) for run in runs]
