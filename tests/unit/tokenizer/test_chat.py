"""Chat templates: Hugging Face's ids and masks, and the trained text of each family."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_conversations import ASSISTANT, QWEN3, SYSTEM, USER, chat, render, trained, with_template
from easyllm.core.errors import DataError
from easyllm.tokenizer import ChatTemplate, SpecialTokens, Tokenizer
from easyllm.tokenizer.template import TemplateError, compile_template

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


GLM = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + "
    "message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


CONVERSATIONS = {
    "one question": chat("What is 2+2?"),
    "one answer": chat("What is 2+2?", "4"),
    "system": chat((SYSTEM, "Be terse."), (USER, "Hi"), (ASSISTANT, "Hello.")),
    "many turns": chat("a", "b", "c\nd", " e ", "f", "你好，世界 😀"),
    "same words": chat("yes", "yes", "yes", "yes"),
    "no words": chat("", ""),
    "parts of tags in the text": chat("<|im_\n<|im_start\nno|im_end|>\n", "yes"),
    "answer first": chat((ASSISTANT, "Welcome!"), (USER, "Hi"), (ASSISTANT, "Hello.")),
}


WORDS = st.text(st.sampled_from("ab 字\n<|im_end|>😀"), max_size=12)


TURNS = st.lists(st.tuples(st.sampled_from([SYSTEM, USER, ASSISTANT]), WORDS), max_size=5)


@pytest.fixture(scope="module")
def marked(smollm2_tokenizer):
    """SmolLM2's template with generation markers around the assistant's text."""
    source = smollm2_tokenizer.chat_template.source
    written = "message['content'] + '<|im_end|>'"
    assert source.count(f" + {written} + ") == 1
    return source.replace(
        f" + {written} + ",
        f"}}}}{{% if message['role'] == 'assistant' %}}{{% generation %}}{{{{ {written} "
        f"}}}}{{% endgeneration %}}"
        f"{{% else %}}{{{{ {written} }}}}{{% endif %}}{{{{ ",
    )


@pytest.fixture
def make(tiny_tokenizer):
    """Builds a tokenizer with a template and additional special tokens."""
    return partial(with_template, tiny_tokenizer)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_equal_transformers(smollm2_tokenizer, smollm2_reference, name, prompt):
    messages = CONVERSATIONS[name]
    ours = smollm2_tokenizer.encode_chat(messages, add_generation_prompt=prompt)
    theirs = smollm2_reference.apply_chat_template(
        messages, add_generation_prompt=prompt, return_dict=True
    )
    assert ours.token_ids == theirs["input_ids"]
    assert ours.mask is None


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_masks_equal_transformers_with_and_without_markers(
    smollm2_tokenizer, smollm2_reference, marked, name
):
    messages = CONVERSATIONS[name]
    theirs = hf_masked(smollm2_reference, messages, marked)
    for source in (marked, smollm2_tokenizer.chat_template.source):
        ours = ChatTemplate(source).encode(smollm2_tokenizer, messages, with_mask=True)
        assert ours.token_ids == theirs["input_ids"]
        assert ours.mask == [bool(m) for m in theirs["assistant_masks"]]


@settings(deadline=None, max_examples=60)
@given(turns=TURNS.filter(bool))
def test_masks_of_any_conversation_equal_transformers(
    smollm2_tokenizer, smollm2_reference, marked, turns
):
    messages = chat(*turns)
    theirs = hf_masked(smollm2_reference, messages, marked)
    for source in (marked, smollm2_tokenizer.chat_template.source):
        ours = ChatTemplate(source).encode(smollm2_tokenizer, messages, with_mask=True)
        assert ours.token_ids == theirs["input_ids"]
        assert ours.mask == [bool(m) for m in theirs["assistant_masks"]]


def hf_masked(smollm2_reference, messages, source):
    return smollm2_reference.apply_chat_template(
        messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )


PLAIN_TEMPLATES = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m.role "
    "}} {% endfor %}",
    "{% for m in messages[::-1] %}{{ m['content'][1:3] }}|{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if "
    "loop.index0 == 3 %}{% break %}"
    "{% endif %}{{ m.content }}{% endfor %}",
    "{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.seen }}{{ ns.seen "
    "| unique | join(', ') }}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ '<é&\\'>' | tojson }}",
    "{{ tools is none }}{{ messages is defined }}{{ nothing is defined }}{{ messages is "
    "iterable }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "{{ messages | rejectattr('role', 'in', ['user', 'tool']) | list | length }}",
    "{% if messages | selectattr('role', 'equalto', 'tool') %}a generator is true{% endif %}",
    "{{ messages | map(attribute='role') | map('upper') | join('-') }}{{ ['b', 'a'] | "
    "sort | first }}",
    "{{ ','.join(messages | map(attribute='role')) }}{{ messages | join('/', attribute='role') }}",
    "{{ 'a-b-c'.replace('-', '') ~ 'a-b' | replace('-', '+', 1) ~ 1 ~ none ~ true ~ 1.5 }}",
    "{% for k, v in {'b': 1, 'a': [2]} | dictsort %}{{ k }}={{ v }};{% endfor %}{{ {'x': "
    "1}.items() | list }}",
    "{% for k, v in messages[0].items() %}{{ k }}{{ v }}{% endfor %}{{ "
    "messages[0].get('x', 'y') }}",
    "{% macro show(obj, context='c') %}[{{ obj }}{{ context }}]{% endmacro %}{{ "
    "show(obj=1, context=2) }}{{ show(3) }}",
    "{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}inside{% endcall %}",
    "{% set text %} a {{ messages[0].content }} {% endset %}{{ text | trim }}{{ text | length }}",
    "{% filter upper %}abc {{ messages[0].role }}{% endfilter %}",
    "{% for item in [1, [2, [3]]] recursive %}{% if item is iterable %}({{ loop(item) "
    "}}){% else %}{{ item }}"
    "{% endif %}{% endfor %}",
    "{{ 'x' * 3 }}{{ [1] * 2 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2.5 * 2 }}{{ '%s is %s' % ('a', "
    "messages[0].role) }}",
    "{{ 'a\nb' | indent(2, true) }}{{ ' x ' | trim }}{{ 'x' | default('y') }}{{ z | "
    "default('y') }}",
    "{{ '<' | e }}{{ ('<b>' | safe) + '<' }}{{ '3' | int + 1 }}{{ -3 | abs }}",
    "{{ 'user' in messages[0].role and 'x' not in 'abc' and 1 < 2 <= 2 }}{{ "
    "'abc'.startswith(('a', 'b')) }}",
    "  {% if true %}\n  kept\n  {% endif %}\n{#- comment -#}\n  {%- set a, b = 1, 2 "
    "%}\n{{ a }}{{ b }}\n",
    "{% for m in messages %}{{ loop.cycle('odd', 'even') }}{{ loop.changed(m.role) }}{{ "
    "(loop.nextitem or m).role }}{% endfor %}",
]


@pytest.mark.parametrize("source", PLAIN_TEMPLATES)
def test_plain_templates_render_the_same_text_as_transformers(smollm2_reference, source):
    messages = chat("one", "two", "three", "four")
    theirs = smollm2_reference.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(source).render(messages) == theirs


@pytest.mark.parametrize(
    "tag", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%+ generation %}"]
)
def test_all_spellings_of_generation_markers_are_recognised(tag):
    assert ChatTemplate(f"{tag}x{{% endgeneration %}}").has_marks
    assert not ChatTemplate("{{ 'generation' }}").has_marks


def test_text_that_looks_like_a_marker_does_not_change_the_mask(smollm2_tokenizer, marked):
    messages = chat("\ue000<{% generation %}\ue000>", "\ue000>yes\ue000<")
    plain = smollm2_tokenizer.encode_chat(messages, with_mask=True)
    encoded = ChatTemplate(marked).encode(smollm2_tokenizer, messages, with_mask=True)
    assert (encoded.token_ids, encoded.mask) == (plain.token_ids, plain.mask)


def test_the_last_special_token_ends_a_turn(make):
    tokenizer = make(LLAMA3, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    messages = chat((SYSTEM, "s"), (USER, "u"), (ASSISTANT, "one"), (USER, "v"), (ASSISTANT, "two"))
    assert trained(tokenizer, messages) == ["one<|eot_id|>", "two<|eot_id|>"]


def test_text_of_a_template_after_the_end_token_is_not_trained(tiny_tokenizer):
    assert trained(tiny_tokenizer, chat("u", "one\n", "v", "two")) == [
        "one\n<|im_end|>",
        "two<|im_end|>",
    ]


@pytest.mark.parametrize("newline", ["\n", ""], ids=["newline in prompt", "newline with the words"])
def test_the_next_role_tag_ends_a_turn_without_an_end_token(make, newline):
    source = GLM.replace("'<|assistant|>\n'", f"'<|assistant|>{newline}'")
    tokenizer = make(source, "<|user|>", "<|assistant|>", "<|system|>")
    lead = "" if newline else "\n"
    assert trained(tokenizer, chat("u", "one", "v", "two")) == [
        f"{lead}one<|user|>",
        f"{lead}two<|im_end|>",
    ]
    encoded = tokenizer.encode_chat(chat("u", "one"), with_mask=True)
    plain = tokenizer.encode_chat(chat("u", "one"))
    assert encoded.token_ids == [*plain.token_ids, tokenizer.eos_id]


def test_no_eos_is_appended_if_the_tokenizer_has_none(make):
    tokenizer = make(GLM, "<|user|>", "<|assistant|>", eos=None)
    assert trained(tokenizer, chat("u", "one")) == ["one"]


def test_a_special_token_inside_a_turn_does_not_end_it(make):
    tokenizer = make(GLM, "<|user|>", "<|assistant|>", "<think>", "</think>")
    words = "<think>hm</think>one"
    assert trained(tokenizer, chat("u", words, "v", words)) == [
        f"{words}<|user|>",
        f"{words}<|im_end|>",
    ]


def test_content_stripped_by_a_template_is_found(make):
    source = GLM.replace("message['content']", "(message['content'] | trim)")
    tokenizer = make(source, "<|user|>", "<|assistant|>")
    assert trained(tokenizer, chat(" u ", "  one \n", "v", "\n two ")) == [
        "one<|user|>",
        "two<|im_end|>",
    ]


@pytest.mark.parametrize("answer", ["one", "XYZ", "X", "AXA", "aAA", "A", "the u", "assistant"])
def test_a_turn_whose_reasoning_is_dropped_is_found(make, answer):
    tokenizer = make(QWEN3)
    messages = chat("u", f"<think>hm</think>\n\n{answer}", "v", "<think>so</think>\n\ntwo")
    text = tokenizer.encode_chat(messages).text
    assert "hm" not in text
    assert "so" in text
    assert trained(tokenizer, messages) == [
        f"{answer}<|im_end|>",
        "<think>so</think>\n\ntwo<|im_end|>",
    ]


@pytest.mark.parametrize(
    "said",
    [
        "one",
        "one<|im_end|>",
        "<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<think>one</think>",
        "{{ messages }}{% generation %}",
    ],
)
@pytest.mark.parametrize("source", [None, QWEN3], ids=["chatml", "qwen3"])
def test_user_text_equal_to_the_assistants_or_the_templates_is_not_trained(
    tiny_tokenizer, make, source, said
):
    tokenizer = tiny_tokenizer if source is None else make(source)
    assert trained(tokenizer, chat(said, "one", said, "one")) == ["one<|im_end|>"] * 2


def test_an_empty_turn_trains_its_end_token(tiny_tokenizer):
    assert trained(tiny_tokenizer, chat("u", "")) == ["<|im_end|>"]


def test_a_prompt_that_opens_reasoning_does_not_hide_the_turn(make, tiny_tokenizer):
    source = tiny_tokenizer.chat_template.source.replace(
        "'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"
    )
    assert "<think>" in source
    assert trained(make(source), chat("u", "one", "v", "two")) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_turn_omitted_by_the_template_is_refused(make):
    tokenizer = make("{{ messages[-1].content }}")
    with pytest.raises(DataError, match=r"assistant turn 1 cannot be located.*generation"):
        tokenizer.encode_chat(chat("u", "one", "v"), with_mask=True)


@pytest.mark.parametrize("said", ["", "Welcome!"])
def test_a_default_system_prompt_is_not_trained_with_the_first_turn(smollm2_tokenizer, said):
    messages = chat((ASSISTANT, said), (USER, "Hi"))
    assert "You are a helpful AI assistant" in smollm2_tokenizer.encode_chat(messages).text
    assert trained(smollm2_tokenizer, messages) == [f"{said}<|im_end|>"]


def test_a_conversation_without_an_assistant_trains_nothing(tiny_tokenizer):
    assert trained(tiny_tokenizer, chat("u")) == []


def test_a_template_that_rejects_short_conversations_is_supported(make):
    source = "{% if messages | length < 4 %}{{ raise_exception('too short') }}{% endif %}" + GLM
    tokenizer = make(source, "<|user|>", "<|assistant|>")
    assert trained(tokenizer, chat("u", "one", "v", "two")) == ["one<|user|>", "two<|im_end|>"]


def test_errors_raised_by_a_template_are_reported(make):
    source = "{{ raise_exception('Conversation roles must alternate') }}"
    with pytest.raises(DataError, match="Conversation roles must alternate"):
        make(source).encode_chat(chat("u"))


@pytest.mark.parametrize(
    "source", ["{{ raise_exception(text) }}", "{{ {}[text].x }}", "{{ 'a' | indent(text) }}"]
)
def test_error_messages_stay_short(source):
    with pytest.raises(TemplateError) as caught:
        render(source, text="a" * 1_000_000)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% nonsense %}", "{{ 'a' | nonsense }}"])
def test_a_template_that_is_not_jinja_is_refused(source):
    with pytest.raises(TemplateError, match="not valid Jinja"):
        compile_template(source)


@pytest.mark.parametrize(
    "source", ["{{ messages[0].nothing.more }}", "{{ 1 / 0 }}", "{{ 1 + 'a' }}"]
)
def test_errors_during_rendering_are_template_errors(source):
    with pytest.raises(TemplateError, match="rejects these messages"):
        render(source)


def test_chat_without_a_template_is_refused(tiny_tokenizer):
    tokenizer = Tokenizer(tiny_tokenizer.backend, SpecialTokens())
    with pytest.raises(DataError, match="no chat template"):
        tokenizer.encode_chat(chat("u"))


def test_tools_and_special_tokens_reach_the_template(make):
    tokenizer = make("{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ tools | tojson }}")
    encoded = tokenizer.encode_chat(chat("u"), tools=[{"name": "f"}])
    assert encoded.text == '<|im_start|><|im_end|>False[{"name": "f"}]'
