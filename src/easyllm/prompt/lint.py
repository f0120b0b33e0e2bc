"""Finds faults of structured prompts: missing sections, unresolved variables, mixed markers."""

from collections.abc import Mapping
from dataclasses import dataclass

from easyllm.prompt.structured import CRISPE, HEADING, ITEM, VARIABLE, canonical, parse

REQUIRED = ("Role", "Profile", "Rules", "Workflow", "Initialization")


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a prompt.

    Attributes:
        rule: `missing-section`, `unresolved-variable`, `mixed-markers`, `wrong-number`,
            `skipped-level`, `repeated-section`, `empty-section`.
        line: number of its line, from 1; 0 for the whole prompt.
        message: what is wrong, and what to do.
    """

    rule: str
    line: int
    message: str


def lint(text: str, variables: Mapping[str, str] | None = None) -> list[Fault]:
    """Returns the faults of a prompt in Markdown, by line.

    Args:
        text: the prompt.
        variables: values that will be given; other variables are unresolved unless they name a
            section.

    Raises:
        ConfigError: the text has no heading.
    """
    prompt = parse(text)
    faults = _sections(text)
    named = {name.lower() for name in prompt.names}
    given = set(variables or {})
    for number, line in enumerate(text.splitlines(), start=1):
        for name in VARIABLE.findall(line):
            if canonical(name).lower() not in named and name not in given:
                advice = "add the section, or give a value with NAME=VALUE"
                faults.append(
                    Fault("unresolved-variable", number, f"<{name}> names no section; {advice}")
                )
    return sorted([*faults, *_markers(text)], key=lambda fault: fault.line)


def _sections(text: str) -> list[Fault]:
    """Returns missing, repeated, empty sections and skipped heading levels."""
    faults, seen, last = list[Fault](), dict[str, int](), 0
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines, start=1) if HEADING.match(line)]
    for start, end in zip(starts, [*starts[1:], len(lines) + 1], strict=True):
        found = HEADING.match(lines[start - 1])
        assert found is not None, "a heading"
        level, title = len(found[1]), found[2]
        name = canonical(title.replace("：", ":").partition(":")[0].rstrip("-0123456789 "))
        if last and level > last + 1:
            faults.append(
                Fault("skipped-level", start, f"a heading of level {level} follows level {last}")
            )
        last = level
        if name in seen and name != "Skill":
            where = seen[name]
            faults.append(
                Fault("repeated-section", start, f"{title!r} is in line {where} too; merge them")
            )
        seen.setdefault(name, start)
        has_value = ":" in title.replace("：", ":")
        if not has_value and not any(line.strip() for line in lines[start : end - 1]):
            faults.append(Fault("empty-section", start, f"{title!r} is empty; fill or remove it"))
    required = list(CRISPE) if set(CRISPE) & set(seen) else list(REQUIRED)
    missing = [name for name in required if name not in seen]
    return faults + [
        Fault("missing-section", 0, f"there is no section {name!r}; add it") for name in missing
    ]


def _markers(text: str) -> list[Fault]:
    """Returns lists whose items have different marks, and wrong numbers."""
    faults, mark, number = list[Fault](), "", 0
    for line_number, line in enumerate(text.splitlines(), start=1):
        if HEADING.match(line):
            mark, number = "", 0
            continue
        found = ITEM.match(line)
        if found is None or line.startswith((" ", "\t")):
            continue
        own = "1." if found[1] else found[2]
        if mark and own != mark:
            faults.append(
                Fault("mixed-markers", line_number, f"{own!r} in a list of {mark!r}; use one mark")
            )
        mark = mark or own
        if found[1]:
            number += 1
            if int(found[1]) != number:
                faults.append(
                    Fault("wrong-number", line_number, f"item {found[1]} should be {number}")
                )
                number = int(found[1])
    return faults


__all__ = ["REQUIRED", "Fault", "lint"]
