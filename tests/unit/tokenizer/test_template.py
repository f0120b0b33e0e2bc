"""Hostile chat templates: no access to the interpreter, bounded time and memory."""

import copy
import threading
import time
import tracemalloc

import pytest

from chat_conversations import QWEN3, chat, render
from easyllm.tokenizer import ChatTemplate, template_budget
from easyllm.tokenizer.template import TemplateError, compile_template

ESCAPES = [
    "{{ messages.__class__.__mro__ }}",
    "{{ messages['__class__']['__mro__'] }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ [messages] | map('attr', '__class__') | list }}",
    "{{ [messages] | selectattr('__class__') | list }}",
    "{{ ['x'] | join(attribute='__class__') }}",
    "{{ messages | groupby('__class__') | map(attribute='grouper') | list }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "{{ ('{0.__class__}' | safe).format(messages) }}",
    "{{ ['{0.__class__}'] | map('format', messages) | list }}",
    "{{ '%s' % messages.__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace().__init__.__globals__ }}",
    "{{ range.__init__.__globals__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller.__class__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in [1] %}{{ loop._iterable }}{{ loop.__class__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ (messages | map('upper')).gi_frame }}",
    "{{ nothing.__class__ }}{{ nothing._fail_with_undefined_error }}",
    "{{ messages | __made | attr('__class__') }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% from '/etc/passwd' import x %}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ dict.update(messages[0], {'role': 'x'}) }}",
    "{{ dict.clear(messages[0]) }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{% set messages[0].role = 'x' %}",
    "{% set x = messages[0] %}{% set x.role = 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_templates_can_access_only_the_messages(source):
    messages = chat("hi")
    before = copy.deepcopy(messages)
    try:
        text = render(source, messages=messages)
    except TemplateError:
        text = ""
    assert set(text) <= set("[]() ,Undefined")
    assert messages == before


LONG = "{% set a = 'a' * 3900000 %}{% set u = 'я' * 3900000 %}"


NS = "{% set ns = namespace(x='aaaaaaaaaa', y=[]) %}"


ATTACKS = {
    # loops
    "nested loops": "{% for i in range(5000) %}{% for j in range(5000) %}{% endfor %}{% endfor %}",
    "loops in a macro": "{% macro m() %}{% for i in range(999) %}{% endfor %}{% endmacro %}"
    "{% for i in range(999) %}{{ m() }}{% endfor %}",
    "loops in a block": "{% block b %}{% for i in range(5000) %}{% for j in range(5000) %}{% "
    "endfor "
    "%}{% "
    "endfor %}"
    "{% endblock %}",
    "recursive loops": "{% for i in range(5000) recursive %}{% if loop.depth < 2 %}{{ "
    "loop(range(99999)) "
    "}}"
    "{% endif %}{% endfor %}",
    "recursive loops by keyword": "{% for i in range(5000) recursive %}{% if loop.depth < 2 %}"
    "{{ loop(iterable=range(99999)) }}{% endif %}{% endfor %}",
    "a huge range": "{% for i in range(10**9) %}{% endfor %}",
    "a huge range in a list": "{{ range(1000000000) | list }}",
    "many lists": "{% for i in range(99999) %}{% set x = range(50000) | list %}{% endfor %}",
    "loops with the budget overwritten": "{% set __budget = none %}{% set budget = none %}"
    "{% for i in range(5000) %}{% for j in range(5000) %}{% endfor %}{% endfor %}",
    "macros that call themselves": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros that call themselves twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% "
    "endif "
    "%}"
    "{% endmacro %}{{ m(60) }}",
    "blocks that call themselves": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "long chains of generators": "{% set ns = namespace(g=['a']) %}{% for i in range(99999) %}"
    "{% set ns.g = ns.g | map('string') %}{% endfor %}{{ ns.g | list }}",
    # doubling
    "doubling by ~": NS + "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": NS + "{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by *": NS + "{% for i in range(60) %}{% set ns.x = ns.x * 2 %}{% endfor %}",
    "doubling by join": NS
    + "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling by join's text": NS
    + "{% for i in range(60) %}{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
    "doubling by replace": NS
    + "{% for i in range(60) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "doubling by a block": NS
    + "{% for i in range(60) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x "
    "%}{% endfor %}",
    "doubling by a macro": NS
    + "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% for i in range(60) %}{% set ns.x = "
    "m(ns.x) %}{% endfor %}",
    "doubling by escape": "{% set ns = namespace(x='&') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x | string | forceescape | replace('a', '&&') %}{% endfor %}",
    "doubling by format": NS
    + "{% for i in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling by tojson": NS
    + "{% for i in range(60) %}{% set ns.x = (ns.x ~ '\\\\') | tojson %}{% endfor %}",
    "doubling of lists by +": NS
    + "{% for i in range(60) %}{% set ns.y = ns.y + ns.y + [1] %}{% endfor %}",
    "doubling of lists by *": "{{ ([1] * 9999999) | length }}",
    "doubling of tuples": "{{ ((1,) * 9999999) | length }}",
    "doubling of numbers": "{% set ns = namespace(x=99) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a huge power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a huge power by a number": "{{ ('f' * 3900000) | int(0, 16) }}",
    # nested values that contain themselves many times
    "lists of lists": NS
    + "{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "tuples of tuples": NS
    + "{% for i in range(40) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "dicts of dicts": NS
    + "{% for i in range(40) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x "
    "| tojson }}",
    "dicts by dict": NS
    + "{% for i in range(40) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "dicts by values": NS
    + "{% for i in range(40) %}{% set ns.x = dict(a=ns.x, b=ns.x).values() %}{% endfor "
    "%}{{ ns.x }}",
    "lists compared": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set ns.x = "
    "[ns.x, "
    "ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "macro arguments": NS
    + "{% macro m() %}{% set ns.x = varargs %}{% endmacro %}{% for i in range(40) %}{{ "
    "m(ns.x, ns.x) }}{% endfor %}"
    "{{ ns.x }}",
    "macro keywords": NS
    + "{% macro m() %}{% set ns.x = kwargs %}{% endmacro %}{% for i in range(40) %}{{ "
    "m(a=ns.x, b=ns.x) }}"
    "{% endfor %}{{ ns.x }}",
    "many times a long text": LONG + "{{ [a] * 100 }}",
    "fromkeys": LONG + "{{ {}.fromkeys(range(99999), a) | tojson }}",
    # a single operation with a large result
    "center": "{{ 'a'.center(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "rjust": "{{ 'a' | attr('rjust') }}{{ ('a' | attr('rjust'))(999999999) }}",
    "zfill": "{{ 'a'.zfill(999999999) }}",
    "expandtabs": "{{ '\\t'.expandtabs(999999999) }}",
    "padding of safe text": "{{ ('a' | safe).ljust(999999999) }}",
    "the center filter": "{{ 'a' | center(999999999) }}",
    "format": "{{ '{:>999999999}'.format('a') }}",
    "nested format": "{{ '{:>{}}'.format('a', 999999999) }}",
    "format_map": "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    "the format filter": "{{ '%999999999d' | format(1) }}",
    "format by map": "{{ ['{:>999999999}'.format] | map('string') | list }}{{ "
    "'{:>999999999}'.format(1) "
    "}}",
    "widths": "{{ '%999999999d' % 1 }}",
    "widths by *": "{{ '%*d' % (999999999, 1) }}",
    "precision": "{{ '%.999999999f' % 1 }}",
    "format of many": LONG + "{{ ('%s' * 999) % ((a,) * 999) }}",
    "format of one many times": LONG + "{{ ('%(a)s' * 999) % {'a': a} }}",
    "format of many by repr": "{% set x = ['aaaaaaaa'] * 30000 %}{{ ('%r' * 999) % ((x,) * 999) }}",
    "bytes": "{{ 'a'.encode().ljust(999999999) }}",
    "to_bytes": "{{ (1).to_bytes(999999999, 'big') }}",
    "indent": "{{ 'a' | indent(999999999) }}",
    "indent of many lines": "{{ ('\\n' * 3900000) | indent(64, true, true) }}",
    "indent by a text": LONG + "{{ ('\\n' * 9999) | indent(a) }}",
    "tojson's indent": "{{ [1] | tojson(indent=999999999) }}",
    "tojson's indent of deep values": "{% set ns = namespace(x=range(50000) | list) %}{% for i in "
    "range(300) "
    "%}"
    "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson(indent=16) }}",
    "tojson's separators": LONG
    + "{{ (range(9999) | list) | tojson(separators=(a[:999999], ':')) }}",
    "tojson's escapes": "{{ ('\\x00' * 3900000) | tojson }}",
    "replace of nothing": LONG + "{{ a | replace('', a) }}",
    "replace by keyword": LONG + "{{ a | replace(new=a, old='a') }}",
    "replace by a method": LONG + "{{ a.replace('a', a) }}",
    "replace of safe text": LONG + "{{ (a | safe).replace('a', a) }}",
    "replace by map": LONG
    + "{{ (range(999) | map('string') | map('replace', '1', a)) | list | length }}",
    "join by keyword": LONG + "{{ range(999) | join(d=a) }}",
    "join of an attribute": LONG
    + "{% set ns = namespace(x=a) %}{{ ([ns] * 999) | join(attribute='x') }}",
    "join by a method": LONG + "{{ a.join(['b'] * 999) }}",
    "join of letters": LONG + "{{ u | join }}",
    "letters": LONG + "{{ u | list }}",
    "letters by sort": LONG + "{{ u | sort }}",
    "letters by a method": LONG + "{{ ''.join(u) }}",
    "split": "{{ ('яя ' * 1300000).split(' ') }}",
    "split at blanks": "{{ ('я ' * 1900000).split() }}",
    "splitlines": "{{ ('\\n' * 3900000).splitlines() }}",
    "batch": "{{ [1] | batch(999999999, 'x') | list }}",
    "slice": "{{ [1] | slice(99999999) | list }}",
    "sum of lists": "{{ ([[1] * 10000] * 9999) | sum(start=[]) }}",
    "sum of texts": LONG + "{{ [a, a] | sum(start='') }}",
    "round": "{{ 5 | round(-999999999) }}",
    "strftime": LONG + "{{ strftime_now(a) }}",
    "escape": "{{ ('&' * 3900000) | e }}",
    # large totals of small results
    "long output": LONG + "{% for i in range(999) %}{{ a }}{% endfor %}",
    "long constant output": "{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}",
    "long output in a macro": LONG
    + "{% macro m() %}{% for i in range(999) %}{{ a }}{% endfor %}{% endmacro %}{{ m() | length }}",
    "long constant output in a macro": "{% macro m() %}{% for i in range(99999) %}"
    + "a" * 9999
    + "{% endfor %}{% endmacro %}{{ m() | length }}",
    "long output in a block": LONG
    + "{% set x %}{% for i in range(999) %}{{ u | upper }}{% endfor %}{% endset %}{{ x | length }}",
    "long output in a filter": LONG
    + "{% filter length %}{% for i in range(999) %}{{ a }}{% endfor %}{% endfilter %}",
    "long output in a call": LONG
    + "{% macro m() %}{% for i in range(999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}{{ a }}{% endcall %}",
    "long output between marks": LONG
    + "{% generation %}{% for i in range(999) %}{{ a }}{% endfor %}{% endgeneration %}",
    "texts kept by recursion": LONG
    + "{% macro m(n) %}{% set y = u ~ n %}{{ m(n + 1) }}{{ y | length }}{% endmacro %}{{ m(0) }}",
    "constants kept by recursion": "{% macro m(n) %}{% set y %}{% for i in range(300) %}"
    + "a" * 9999
    + "{% endfor %}{% endset %}{{ m(n + 1) }}{{ y | length }}{% endmacro %}{{ m(0) }}",
    "slices kept by recursion": LONG
    + "{% macro m(n) %}{{ u[1:] }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "pieces kept by recursion": LONG
    + "{% macro m(n) %}{% set y = u.split('b', 1) %}{{ m(n + 1) }}{{ y | length }}{% "
    "endmacro %}{{ m(0) }}",
    "many slices": LONG + "{% for i in range(99999) %}{% set x = u[1:] %}{% endfor %}",
    "many filters": LONG + "{% for i in range(99999) %}{% set x = u | upper %}{% endfor %}",
    "many searches": LONG + "{% for i in range(99999) %}{% if 'b' in u %}{% endif %}{% endfor %}",
    "many comparisons": LONG
    + "{% set b = 'a' * 3900000 %}{% for i in range(99999) %}{% if a == b %}{% endif %}{% "
    "endfor %}",
    "many searches without a loop": LONG + "{% if 'bя' in u %}{% endif %}" * 500,
    "many tuples looked up": "{% set t = (1,) * 99999 %}{% set d = {t: 1} %}"
    + "{% for i in range(999) %}{% if d[t] %}{% endif %}{% endfor %}",
    "one long search": LONG + "{{ a.rfind('ab' ~ 'a' * 1000000) }}",
    "one long strip": LONG + "{{ a.strip('b' * 1000000 ~ 'a') }}",
    "one long trim": LONG + "{{ a | trim('b' * 1000000 ~ 'a') }}",
    # templates that Python itself cannot compile
    "a long template": "{{ messages }}" * 10_000,
    "nested ifs": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "nested loops in the source": "{% for a in [1] %}" * 50 + "{% endfor %}" * 50,
    "nested parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "a long sum": "{{ 1" + "+1" * 10_000 + " }}",
    "a long chain of filters": "{{ 'a'" + "|upper" * 5_000 + " }}",
    "a long chain of attributes": "{{ a" + ".a" * 10_000 + " }}",
    "a long chain of elifs": "{% if a %}" + "{% elif a %}" * 9000 + "{% endif %}",
    "a long chain of nots": "{{ " + "not " * 20_000 + "a }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_templates_are_bounded_in_time_and_memory(monkeypatch, name):
    monkeypatch.setattr(template_budget, "MAX_SECONDS", 0.2)
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(TemplateError):
            render(ATTACKS[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.thread_time() - began < 30.0  # the limit is 0.2 s; tolerates slow machines
    assert peak < 250_000_000


def test_the_cpu_time_of_a_rendering_is_bounded():
    with pytest.raises(TemplateError, match=r"takes more than 1\.0 s"):
        render(ATTACKS["many searches"])


def test_waiting_does_not_count_as_cpu_time(monkeypatch):
    monkeypatch.setattr(template_budget, "MAX_SECONDS", 0.2)

    class Slow:
        def __str__(self):
            time.sleep(0.3)
            return "waited"

    assert render("{{ slow }}{{ slow }}", slow=Slow()) == "waitedwaited"


def test_each_rendering_has_a_separate_budget():
    source = "{% for i in range(300) %}{% for j in range(600) %}{% endfor %}{% endfor %}done"
    write = compile_template(source)
    written = []
    threads = [threading.Thread(target=lambda: written.append(write())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*written, write(), write()] == ["done"] * 5


def test_a_template_works_again_after_exceeding_its_budget():
    write = compile_template(
        "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}ok"
    )
    with pytest.raises(TemplateError):
        write(n=5000)
    assert write(n=3) == "ok"


def test_a_long_conversation_is_within_the_limits(smollm2_reference):
    messages = chat(*(["word 字 " * 250, "<think>hm</think>\n\n" + "word 字 " * 250] * 200))
    theirs = smollm2_reference.apply_chat_template(messages, chat_template=QWEN3, tokenize=False)
    assert ChatTemplate(QWEN3).render(messages) == theirs
