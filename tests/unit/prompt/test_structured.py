"""Structured prompts: Markdown round trip, variables, lint, the prompts in the package."""

import pytest

from easyllm.core.errors import ConfigError, SourceError
from easyllm.prompt.library import load_prompt, prompt_names, read_prompt_text, system_message
from easyllm.prompt.lint import lint
from easyllm.prompt.structured import (
    Section,
    StructuredPrompt,
    parse,
    render,
    to_flat,
    to_markdown,
)

PROMPT = StructuredPrompt(
    role="Cook",
    profile=(("Author", "A"), ("Language", "English"), ("Mood", "calm: very")),
    skills=(Section("Sauces", items=("Stirs", "Tastes <Dish>")), Section("", items=("Cuts",))),
    sections=(
        Section("Background", "Two lines\nof text."),
        Section("Rules", "Always:", ("No sugar", "1 + 1 = 2")),
        Section("Own section", items=("x",)),
        Section("Initialization", "As a <Role>, follow the <Rules> and <constraints>."),
    ),
)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_markdown_round_trip(language):
    prompt = PROMPT
    if language == "zh":
        prompt = StructuredPrompt(
            role="厨师",
            profile=(("Author", "甲"), ("语气", "平和")),
            skills=(Section("调味", items=("搅拌",)),),
            sections=(Section("Rules", items=("不加糖",)), Section("Initialization", "作为<角色>")),
            language="zh",
        )
    text = to_markdown(prompt)
    assert parse(text) == prompt
    assert ("## 规则" in text) == (language == "zh")


def test_prompts_from_elsewhere_are_read():
    text = """# Role : Poet
## Profile :
* Author: x
- language: 中文
### Skill-1
1) Rhymes
   and rhythm
## Constrains
+ short
```
# no heading
```
"""
    prompt = parse(text)
    assert prompt.role == "Poet"
    assert prompt.profile == (("Author", "x"), ("Language", "中文"))
    assert prompt.skills == (Section("", items=("Rhymes and rhythm",)),)
    assert prompt.sections[0].name == "Rules"
    assert [section.name for section in prompt.sections] == ["Rules"]
    assert parse(to_markdown(prompt)) == prompt


def test_variables_are_filled_and_references_stay():
    assert PROMPT.variables == ["Dish"]
    text = render(PROMPT, {"Dish": "<Rules>"})
    assert "Tastes <Rules>" in text
    assert "As a <Role>" in text
    with pytest.raises(ConfigError, match="without a value: <Dish>"):
        render(PROMPT)
    with pytest.raises(ConfigError, match=r"no variable <Dich> \(did you mean 'Dish'\?\)"):
        render(PROMPT, {"Dish": "x", "Dich": "y"})


def test_the_flat_form_has_no_headings():
    text = to_flat(PROMPT)
    assert "#" not in text
    assert text.startswith("1. Role: Cook\n2. Profile:\n   – Author: A\n")
    assert "\n6. Rules: Always:\n   – No sugar\n" in text


def test_lint_finds_each_fault_in_its_line():
    text = """# Role: X
### Skill: y
1. a
3. b
- c
## Rules
## Rules
Use <Tool> and <Role> and <Given>.
"""
    found = [(fault.rule, fault.line) for fault in lint(text, {"Given": "1"})]
    assert found == [
        ("missing-section", 0),
        ("missing-section", 0),
        ("missing-section", 0),
        ("skipped-level", 2),
        ("wrong-number", 4),
        ("mixed-markers", 5),
        ("empty-section", 6),
        ("repeated-section", 7),
        ("unresolved-variable", 8),
    ]
    missing = [fault.message for fault in lint(text) if fault.rule == "missing-section"]
    assert [name for name in ("Profile", "Workflow", "Initialization") if name in str(missing)]
    with pytest.raises(ConfigError, match="has no heading"):
        lint("You are a cook.")


@pytest.mark.parametrize("name", prompt_names())
def test_prompts_in_the_package_are_sound_and_there_in_both_languages(name):
    prompt, text = load_prompt(name), read_prompt_text(name)
    values = dict.fromkeys(prompt.variables, "x")
    assert lint(text, values) == []
    assert parse(to_markdown(prompt)) == prompt
    assert to_markdown(prompt) == text
    twin = load_prompt(name.removesuffix("-zh") if name.endswith("-zh") else f"{name}-zh")
    assert [s.name for s in twin.sections] == [s.name for s in prompt.sections]
    assert len(twin.variables) == len(prompt.variables)


def test_system_messages_by_name_and_file(tmp_path):
    assert "French" in system_message("translator", {"Source": "English", "Target": "French"})
    path = tmp_path / "mine.md"
    path.write_text("# Role: Cook\n")
    assert system_message(str(path)) == "# Role: Cook"
    assert system_message("Be brief.") == "Be brief."
    assert system_message("简短回答") == "简短回答"
    with pytest.raises(SourceError, match="did you mean 'solver'"):
        system_message("solvr")
