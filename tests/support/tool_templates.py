"""Chat templates that write tool calls in each published format, in a frame like ChatML's."""

import json

_FRAME = """{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- if m.tool_calls %}CALLS{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_EACH = "{%- for call in m.tool_calls %}{%- set f = call.function %}{}{%- endfor %}"
_OBJECT = '{{ "{\\"name\\": \\"" ~ f.name ~ "\\", \\"KEY\\": " ~ (f.arguments | tojson) ~ "}" }}'
_ARGUMENTS = _OBJECT.replace("KEY", "arguments")
_PARAMETERS = _OBJECT.replace("KEY", "parameters")
_COMMA = '{{ ", " if not loop.last }}'
_TEXT = "{{ v if v is string else v | tojson }}"
_SECTION = "{{ '<｜tool▁calls▁begin｜>' }}%s{{ '<｜tool▁calls▁end｜>' }}"


def _each(body):
    return _EACH.replace("{}", body)


CALLS = {
    "hermes": _each("{{ '\\n<tool_call>\\n' }}" + _ARGUMENTS + "{{ '\\n</tool_call>' }}"),
    "llama": _each(_PARAMETERS + '{{ "; " if not loop.last }}'),
    "mistral": "{{ '[TOOL_CALLS] [' }}" + _each(_ARGUMENTS + _COMMA) + "{{ ']' }}",
    "phi4": "{{ 'functools[' }}" + _each(_ARGUMENTS + _COMMA) + "{{ ']' }}",
    "granite": "{{ '<|tool_call|>[' }}" + _each(_ARGUMENTS + _COMMA) + "{{ ']' }}",
    "nemotron": "{{ '<TOOLCALL>[' }}" + _each(_ARGUMENTS + _COMMA) + "{{ ']</TOOLCALL>' }}",
    "hunyuan": "{{ '<tool_calls>[' }}" + _each(_ARGUMENTS + _COMMA) + "{{ ']</tool_calls>' }}",
    "deepseek_v3": _SECTION
    % _each(
        "{{ '\\n' if not loop.first }}{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' ~ f.name ~ "
        "'\\n```json\\n' ~ (f.arguments | tojson) ~ '\\n```<｜tool▁call▁end｜>' }}"
    ),
    "deepseek_v31": _SECTION
    % _each(
        "{{ '<｜tool▁call▁begin｜>' + f.name + '<｜tool▁sep｜>' + f.arguments + "
        "'<｜tool▁call▁end｜>' }}"
    ),
    "kimi_k2": "{{ '<|tool_calls_section_begin|>' }}"
    + _each(
        "{{ '<|tool_call_begin|>functions.' ~ f.name ~ ':' ~ loop.index0 ~ "
        "'<|tool_call_argument_begin|>' ~ (f.arguments | tojson) ~ '<|tool_call_end|>' }}"
    )
    + "{{ '<|tool_calls_section_end|>' }}",
    "mistral_v11": _each("{{ '[TOOL_CALLS]' ~ f.name ~ '[ARGS]' ~ (f.arguments | tojson) }}"),
    "glm4": _each("{{ f.name ~ '\\n' ~ (f.arguments | tojson) }}"),
    "qwen3_coder": _each(
        "{{ '\\n<tool_call>\\n<function=' ~ f.name ~ '>\\n' }}"
        "{%- for k, v in f.arguments.items() %}{{ '<parameter=' ~ k ~ '>\\n' }}"
        + _TEXT
        + "{{ '\\n</parameter>\\n' }}{%- endfor %}{{ '</function>\\n</tool_call>' }}"
    ),
    "glm45": _each(
        "{{ '\\n<tool_call>' ~ f.name ~ '\\n' }}"
        "{%- for k, v in f.arguments.items() %}{{ '<arg_key>' ~ k ~ '</arg_key>\\n<arg_value>' }}"
        + _TEXT
        + "{{ '</arg_value>\\n' }}{%- endfor %}{{ '</tool_call>' }}"
    ),
    "seed_oss": _each(
        "{{ '\\n<seed:tool_call>\\n<function=' ~ f.name ~ '>\\n' }}"
        "{%- for k, v in f.arguments.items() %}{{ '<parameter=' ~ k ~ '>' }}"
        + _TEXT
        + "{{ '</parameter>\\n' }}{%- endfor %}{{ '</function>\\n</seed:tool_call>' }}"
    ),
    "minimax_m2": _each(
        "{{ '\\n<minimax:tool_call>\\n<invoke name=\"' ~ f.name ~ '\">\\n' }}"
        "{%- for k, v in f.arguments.items() %}{{ '<parameter name=\"' ~ k ~ '\">' }}"
        + _TEXT
        + "{{ '</parameter>\\n' }}{%- endfor %}{{ '</invoke>\\n</minimax:tool_call>' }}"
    ),
}
SINGLE = ("glm4",)
"""Formats of one call at a time."""
TEMPLATES = {name: _FRAME.replace("CALLS", calls) for name, calls in CALLS.items()}
SILENT = _FRAME.replace("CALLS", "").replace("{%- if tools %}", "{%- if false %}")
"""A template that shows neither tools nor calls."""


def tool(name, **properties):
    """Returns the definition of a tool whose properties are all required."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def calling(*calls, content=""):
    """Returns an assistant's message with calls, pairs of a name and arguments."""
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": "abcdef123", "type": "function", "function": {"name": n, "arguments": a}}
            for n, a in calls
        ],
    }


def turn(template, message, tools=None):
    """Returns what a template writes for an assistant's message, without header and end."""
    question = [{"role": "user", "content": "q"}]
    prompt = template.render(question, tools=tools, add_generation_prompt=True)
    text = template.render([*question, message], tools=tools)
    assert text.startswith(prompt)
    return text.removeprefix(prompt).removesuffix("<|im_end|>\n")


def called(output):
    """Returns the calls of an output as pairs of a name and decoded arguments."""
    return [(call.name, json.loads(call.arguments)) for call in output.calls]
