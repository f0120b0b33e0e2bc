"""Structured prompts: LangGPT's sections and CRISPE as values, with a Markdown round trip.

    # Role: Translator          # 角色：翻译
    ## Profile                  ## 简介
    - Author: ...               - 作者：...
    ### Skill: Terms            ### 技能：术语
    1. ...                      1. ...
    ## Rules                    ## 规则
    1. ...                      1. ...
    ## Workflow                 ## 工作流程
    ## Initialization           ## 初始化
    As a <Role>, follow ...     作为<角色>，……

Sources: LangGPT (arXiv 2402.16929, section 3), github.com/langgptai/LangGPT; CRISPE, Nigh 2023.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from easyllm.core.errors import ConfigError, suggest

Language = Literal["en", "zh"]
Form = Literal["markdown", "flat"]
PROFILE: Mapping[str, str] = {
    "Author": "作者",
    "Version": "版本",
    "Language": "语言",
    "Description": "描述",
}
SECTIONS: Mapping[str, str] = {
    "Background": "背景",
    "Goals": "目标",
    "Rules": "规则",
    "Workflow": "工作流程",
    "Output Format": "输出格式",
    "Examples": "示例",
    "Initialization": "初始化",
}
CRISPE: Mapping[str, str] = {
    "Capacity and Role": "能力与角色",
    "Insight": "背景信息",
    "Statement": "任务",
    "Personality": "风格",
    "Experiment": "尝试",
}
_WORDS = {"Role": "角色", "Profile": "简介", "Skill": "技能", **PROFILE, **SECTIONS, **CRISPE}
_ALIASES = {
    **{chinese: english for english, chinese in _WORDS.items()},
    "Constraints": "Rules",
    "Constrains": "Rules",
    "约束": "Rules",
    "限制": "Rules",
    "Workflows": "Workflow",
    "流程": "Workflow",
    "OutputFormat": "Output Format",
    "Output": "Output Format",
    "Example": "Examples",
    "Skills": "Skill",
    "Goal": "Goals",
}
HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*$")
ITEM = re.compile(r"^\s*(?:(\d+)[.)、]\s*|([-*+–])\s+)(.*?)\s*$")
VARIABLE = re.compile(r"<([A-Za-z\u4e00-\u9fff][\w \-\u4e00-\u9fff]*)>")
_FIELD = re.compile(r"^(.+?)\s*[:：]\s*(.*)$")


@dataclass(frozen=True, slots=True)
class Section:
    """A section: running text, then list items."""

    name: str
    text: str = ""
    items: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredPrompt:
    """A prompt in sections.

    Attributes:
        role: who the model is; empty for CRISPE, whose role is a section.
        profile: author, version, language, description and others, by their English names.
        skills: what the model can do, each a section.
        sections: the other sections in order, by their English names where they have one.
        language: of the headings.
    """

    role: str = ""
    profile: tuple[tuple[str, str], ...] = ()
    skills: tuple[Section, ...] = ()
    sections: tuple[Section, ...] = ()
    language: Language = "en"

    @property
    def names(self) -> set[str]:
        """What a variable may refer to: sections and fields of the profile, in both languages."""
        found = [name for name, _ in self.profile] + [each.name for each in self.sections]
        found += ["Role", "Profile"] if self.role else []
        found += ["Skill", "Skills"] if self.skills else []
        return {*found, *(_WORDS[name] for name in found if name in _WORDS)}

    @property
    def variables(self) -> list[str]:
        """The names in `<...>` that refer to no section, in order; `render` fills them."""
        named = {name.lower() for name in self.names}
        every = dict.fromkeys(VARIABLE.findall(to_markdown(self)))
        return [name for name in every if canonical(name).lower() not in named]


def to_markdown(prompt: StructuredPrompt) -> str:
    """Returns a prompt as Markdown; `parse` returns the same prompt again."""
    zh, lines = prompt.language == "zh", list[str]()
    colon = "：" if zh else ": "

    def word(name: str) -> str:
        return _WORDS.get(name, name) if zh else name

    def body(section: Section, *, numbered: bool = True) -> None:
        lines.extend([section.text] if section.text else [])
        for number, item in enumerate(section.items, start=1):
            lines.append(f"{number}. {item}" if numbered else f"- {item}")
        lines.append("")

    if prompt.role:
        lines += [f"# {word('Role')}{colon}{prompt.role}", ""]
    if prompt.profile:
        lines.append(f"## {word('Profile')}")
        fields = tuple(f"{word(name)}{colon}{value}" for name, value in prompt.profile)
        body(Section("", items=fields), numbered=False)
    for skill in prompt.skills:
        lines.append(f"### {word('Skill')}{colon}{skill.name}".rstrip("：: "))
        body(skill)
    for section in prompt.sections:
        lines.append(f"## {word(section.name)}")
        body(section)
    return "\n".join(lines).rstrip() + "\n"


def to_flat(prompt: StructuredPrompt) -> str:
    """Returns a prompt without Markdown headings, for models that read them badly.

    Every section is a numbered line, its items lines with a dash.
    """
    zh = prompt.language == "zh"
    colon = "：" if zh else ": "
    parts = [Section("Role", prompt.role)] if prompt.role else []
    if prompt.profile:
        fields = tuple(
            f"{_WORDS.get(name, name) if zh else name}{colon}{value}"
            for name, value in prompt.profile
        )
        parts.append(Section("Profile", items=fields))
    parts += [replace(skill, name=f"Skill {skill.name}".strip()) for skill in prompt.skills]
    lines = []
    for number, part in enumerate([*parts, *prompt.sections], start=1):
        first, _, rest = part.name.partition(" ")
        name = part.name
        if zh:
            name = f"{_WORDS['Skill']} {rest}" if first == "Skill" else _WORDS.get(name, name)
        lines.append(f"{number}. {name.strip()}{colon}{part.text}".rstrip())
        lines += [f"   – {item}" for item in part.items]
    return "\n".join(lines) + "\n"


def parse(text: str) -> StructuredPrompt:
    """Returns the prompt that Markdown describes.

    Headings may be English or Chinese; list items may be numbered or marked with `-`, `*`, `+`.

    Raises:
        ConfigError: the text has no heading.
    """
    role, profile, skills, sections = "", list[tuple[str, str]](), list[Section](), list[Section]()
    blocks = _blocks(text)
    if not blocks:
        raise ConfigError("the prompt has no heading; begin it with `# Role: ...` (# 角色：...)")
    chinese = sum("\u4e00" <= char <= "\u9fff" for title, _, _ in blocks for char in title)
    for title, lines, _ in blocks:
        field = _FIELD.match(title)
        name, value = (field[1], field[2]) if field else (title, "")
        kind = canonical(re.sub(r"[-_ ]?\d+$", "", name))
        section = _section(lines)
        if kind == "Role":
            role = value or section.text
        elif kind == "Profile":
            profile += [_profile_field(item) for item in section.items]
        elif kind == "Skill":
            skills.append(replace(section, name=value))
        else:
            sections.append(replace(section, name=canonical(title)))
    return StructuredPrompt(
        role=role,
        profile=tuple(profile),
        skills=tuple(skills),
        sections=tuple(sections),
        language="zh" if chinese else "en",
    )


def render(
    prompt: StructuredPrompt, variables: Mapping[str, str] | None = None, *, form: Form = "markdown"
) -> str:
    """Returns the text of a prompt with its variables filled.

    Variables that name a section (`<Rules>`) are references for the model, and stay.

    Raises:
        ConfigError: a variable has no value, or a value has no variable.
    """
    given, wanted = dict(variables or {}), prompt.variables
    missing = [name for name in wanted if name not in given]
    if missing:
        names = ", ".join(f"<{name}>" for name in missing)
        raise ConfigError(f"the prompt has variables without a value: {names}; give NAME=VALUE")
    for name in given:
        if name not in wanted:
            raise ConfigError(
                f"the prompt has no variable <{name}>{suggest(name, wanted)} (variables: "
                f"{', '.join(wanted) or 'none'}); leave it out"
            )
    text = to_flat(prompt) if form == "flat" else to_markdown(prompt)
    return VARIABLE.sub(lambda found: given.get(found[1], found[0]), text)


def canonical(name: str) -> str:
    """Returns the English name of a section or field, or the name itself.

    >>> canonical("规则"), canonical("constraints"), canonical("Tone")
    ('Rules', 'Rules', 'Tone')
    """
    stripped = name.strip()
    known = {each.lower(): each for each in _WORDS}
    aliases = {each.lower(): english for each, english in _ALIASES.items()}
    low = stripped.lower()
    return known.get(low) or aliases.get(low) or stripped


def _blocks(text: str) -> list[tuple[str, list[str], int]]:
    """Returns the title, lines and line number of each heading's block; code contains none."""
    blocks, fenced = list[tuple[str, list[str], int]](), False
    for number, line in enumerate(text.splitlines(), start=1):
        fenced ^= line.lstrip().startswith("```")
        found = None if fenced else HEADING.match(line)
        if found:
            blocks.append((found[2], [], number))
        elif blocks:
            blocks[-1][1].append(line)
    return blocks


def _section(lines: list[str]) -> Section:
    """Returns the text and items of a block; lines after an item continue it."""
    text, items = list[str](), list[str]()
    for line in lines:
        if found := ITEM.match(line):
            items.append(found[3])
        elif items and line.strip():
            items[-1] += f" {line.strip()}"
        elif not items:
            text.append(line.rstrip())
    return Section("", "\n".join(text).strip(), tuple(items))


def _profile_field(item: str) -> tuple[str, str]:
    found = _FIELD.match(item)
    return (canonical(found[1]), found[2]) if found else ("Description", item)


__all__ = [
    "CRISPE",
    "PROFILE",
    "SECTIONS",
    "VARIABLE",
    "Section",
    "StructuredPrompt",
    "canonical",
    "parse",
    "render",
    "to_flat",
    "to_markdown",
]
