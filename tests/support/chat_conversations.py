"""Conversations, and chat templates that render them."""

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
