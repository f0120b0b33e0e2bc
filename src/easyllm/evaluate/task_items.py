"""Reads the items of an evaluation task from a file of the user."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from easyllm.core.errors import DataError, suggest
from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.evaluate.task_config import FIELD, TaskConfig
from easyllm.examples.data_file import read_rows
from easyllm.prompt.extract import LETTERS, extract

MAX_BYTES = 512 * 2**20
"""Maximum size of a file that is read as a whole."""
_HEADING = re.compile(r"^ = [^=].* = $", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Item:
    """An item of a task.

    Attributes:
        id: hash of its fields, by which runs are compared.
        fields: its fields by name.
        location: where it is in the file.
    """

    id: str
    fields: JsonMapping
    location: str


def read_items(
    task: TaskConfig, path: Path, *, references: Path | None = None, limit: int | None = None
) -> list[Item]:
    """Returns the items of a task.

    Args:
        task: the task.
        path: the data file.
        references: reader `lines`: the references, a line for each line of the file.
        limit: number of items to read; by default all.

    Raises:
        DataError: the file cannot be read, is empty, lacks a field that the task names, or a row
            has no right answer that can be compared.
    """
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{str(path)!r} {state}; give the file with the data of {task.name}")
    if (references is not None) != (task.reader == "lines"):
        if references is not None:
            raise DataError(
                f"task {task.name!r} reads its references from the data file; leave "
                "out --references"
            )
        raise DataError(f"task {task.name!r} needs the references of each line; add --references")
    rows: Iterator[tuple[JsonObject, str]]
    match task.reader:
        case "rows":
            rows = ((row.values, row.location) for row in read_rows(path))
        case "squad":
            rows = _squad(path)
        case "lines":
            assert references is not None, "checked above"
            rows = _lines(path, references)
        case "articles":
            rows = _articles(path)
    items = [_item(fields, where) for fields, where in islice(rows, limit)]
    if not items:
        raise DataError(f"the file {str(path)!r} has no items; check it")
    for item in items:
        _check_fields(task, item)
        _check_answer(task, item)
    return items


def fill(text: str, fields: JsonMapping) -> str:
    """Returns a text with `{{name}}` replaced by the fields' values.

    >>> fill("Q: {{question}}", {"question": "Why {{x}}?"})
    'Q: Why {{x}}?'
    """
    return FIELD.sub(lambda found: _text(fields[found[1]]), text)


def references_of(task: TaskConfig, item: Item) -> tuple[str, ...]:
    """Returns the right answers of an item; a field alone that is a list gives several."""
    alone = FIELD.fullmatch(task.reference)
    value = item.fields[alone[1]] if alone else fill(task.reference, item.fields)
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(_text(each) for each in values))


def choices_of(task: TaskConfig, item: Item) -> tuple[tuple[str, ...], int]:
    """Returns the choices of an item and the number of the right one.

    Raises:
        DataError: they are not a list of two to 26 texts, one is empty, or the right one is not
            among them.
    """
    choices, gold = item.fields[task.choices], item.fields[task.gold]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise DataError(
            f"{item.location}: {task.choices!r} is not a list of 2 to 26 choices; fix the row"
        )
    texts = tuple(_text(each) for each in choices)
    if not all(text.strip() for text in texts):  # no tokens: its probability would be 1
        raise DataError(f"{item.location}: {task.choices!r} has an empty choice; fix the row")
    number = None
    if isinstance(gold, str):
        if gold in texts:
            number = texts.index(gold)
        elif len(gold) == 1 and gold in LETTERS:
            number = LETTERS.index(gold)
    if number is None and str(gold).isdecimal() and not isinstance(gold, bool):
        number = int(gold)
    if number is None or number >= len(texts):
        raise DataError(
            f"{item.location}: {task.gold!r} is {gold!r}, which is not one of the choices; give "
            "its number from 0, its letter or its text"
        )
    return texts, number


def options_text(choices: tuple[str, ...]) -> str:
    """Returns choices with their letters, one per line."""
    return "\n".join(f"{LETTERS[n]}. {choice}" for n, choice in enumerate(choices))


def _text(value: Json) -> str:
    if isinstance(value, list):
        return _text(value[0]) if value else ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _item(fields: JsonMapping, where: str) -> Item:
    text = json.dumps(fields, sort_keys=True, ensure_ascii=True, default=str)
    return Item(hashlib.sha256(text.encode()).hexdigest()[:16], fields, where)


def _check_fields(task: TaskConfig, item: Item) -> None:
    missing = [name for name in task.fields if name not in item.fields]
    if missing:
        named = ", ".join(map(repr, missing))
        raise DataError(
            f"{item.location} lacks {named}, which task {task.name!r} names (fields of the row: "
            f"{', '.join(item.fields) or 'none'}){suggest(missing[0], item.fields)}; add the "
            "fields, or name others in the task's file"
        )


def _check_answer(task: TaskConfig, item: Item) -> None:
    """Checks what is compared with the model's answer, before any answer is generated."""
    if task.kind == "choice":
        choices_of(task, item)
    elif task.kind == "generate" and not task.program:
        rights = references_of(task, item)
        if not rights:
            raise DataError(
                f"{item.location} has no reference ({task.reference} is empty); add one"
            )
        for right in rights:
            if extract(task.extract, right) is None:
                raise DataError(
                    f"{item.location}: the reference has no {task.extract}; fix the row, or "
                    f"`extract` in the file of task {task.name!r}"
                )


def _whole(path: Path) -> str:
    """Returns the text of a file.

    Raises:
        DataError: it is larger than 512 MB, or not UTF-8.
    """
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"the file {str(path)!r} is larger than 512 MB; split it")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"the file {str(path)!r} is not UTF-8 text ({error}); convert it") from None


def _squad(path: Path) -> Iterator[tuple[JsonObject, str]]:
    """Yields the questions of a file in SQuAD's format, or in CMRC's own."""
    try:
        value = json.loads(_whole(path))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the file {str(path)!r} is not JSON ({error}); give SQuAD's format"
        ) from None
    documents: Json = value.get("data") if isinstance(value, dict) else value
    try:
        for document in documents:
            for paragraph in document.get("paragraphs", [document]):
                context = _first_text(paragraph, "context", "context_text")
                for question in paragraph["qas"]:
                    answers = [
                        each["text"] if isinstance(each, dict) else each
                        for each in question["answers"]
                    ]
                    name = question.get("id", question.get("query_id"))
                    fields = {
                        "context": context,
                        "question": _first_text(question, "question", "query_text"),
                        "answers": [str(each) for each in answers],
                        "id": str(name),
                    }
                    if answers:  # SQuAD 2.0 has questions without
                        yield fields, f"{path}: question {name}"
    except (AttributeError, KeyError, TypeError):
        raise DataError(
            f"the file {str(path)!r} is not in SQuAD's format (data, paragraphs, qas, answers); "
            "check it"
        ) from None


def _first_text(values: JsonMapping, *names: str) -> str:
    """Returns the text under the first of several names that there is.

    Raises:
        TypeError: there is none.
    """
    for name in names:
        value = values.get(name)
        if isinstance(value, str):
            return value
    raise TypeError(f"no text under {' or '.join(names)}")


def _lines(path: Path, references: Path) -> Iterator[tuple[JsonObject, str]]:
    """Yields the lines of a source with their references."""
    if not references.is_file():
        raise DataError(f"the file {str(references)!r} of references does not exist")
    sources, rights = (_whole(each).splitlines() for each in (path, references))
    if len(sources) != len(rights):
        raise DataError(
            f"{str(path)!r} has {len(sources)} lines and {str(references)!r} {len(rights)}; they "
            "must correspond line by line"
        )
    for number, (source, right) in enumerate(zip(sources, rights, strict=True), start=1):
        yield {"source": source, "references": [right]}, f"{path}:{number}"


def _articles(path: Path) -> Iterator[tuple[JsonObject, str]]:
    """Yields the articles of a file with WikiText's headings, or all of it as one text."""
    text = _whole(path)
    starts = [found.start() for found in _HEADING.finditer(text)]
    if not starts or text[: starts[0]].strip():
        starts.insert(0, 0)
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        if text[start:end].strip():
            yield {"text": text[start:end]}, f"{path}: character {start}"


__all__ = ["Item", "choices_of", "fill", "options_text", "read_items", "references_of"]
