"""Prompts by name: those in the package, in English and Chinese, and files of the user."""

import re
from collections.abc import Mapping
from pathlib import Path

from easyllm.core.errors import SourceError, read_failure, suggest
from easyllm.prompt.structured import StructuredPrompt, parse, render

_SOURCE = re.compile(r"[\w./~\\:-]+|.*\.(?:md|txt)", re.ASCII)
FOLDER = Path(__file__).with_name("templates")


def prompt_names() -> list[str]:
    """Returns the names of the prompts in the package; Chinese ones end in `-zh`."""
    return sorted(path.stem for path in FOLDER.glob("*.md"))


def read_prompt_text(source: str) -> str:
    """Returns the Markdown of a prompt by name, or of a file.

    Raises:
        SourceError: there is no such prompt or file.
    """
    path = Path(source).expanduser()
    if path.suffix in (".md", ".txt"):
        if not path.is_file():
            raise SourceError(f"the prompt {source!r} does not exist; check the path")
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(
                f"the prompt {source!r} cannot be read ({read_failure(error)}); give a text file "
                "in UTF-8"
            ) from None
    names = prompt_names()
    if source not in names and path.exists():
        kind = "a folder" if path.is_dir() else "not a .md or .txt file"
        raise SourceError(f"the prompt {source!r} is {kind}; give a file such as mine.md")
    if source not in names:
        raise SourceError(
            f"prompt {source!r} is not known{suggest(source, names)}; there are {', '.join(names)},"
            " and files such as mine.md"
        )
    return (FOLDER / f"{source}.md").read_text(encoding="utf-8")


def load_prompt(source: str) -> StructuredPrompt:
    """Returns a prompt by name, or from a Markdown file.

    Raises:
        SourceError: there is no such prompt.
        ConfigError: it has no heading.
    """
    return parse(read_prompt_text(source))


def system_message(source: str, variables: Mapping[str, str] | None = None) -> str:
    """Returns the text of a prompt as a system message, for evaluations and the server.

    Args:
        source: a name or file; anything that cannot be one, such as several words, is the message.
        variables: values of the prompt's variables.

    Raises:
        SourceError, ConfigError: as for `load_prompt` and `render`.
    """
    if not _SOURCE.fullmatch(source):
        return source
    return render(load_prompt(source), variables).strip()


__all__ = ["load_prompt", "prompt_names", "read_prompt_text", "system_message"]
