"""The `easyllm schema` command."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from easyllm.cli.output import home_path, print_json, print_pairs
from easyllm.core.json_types import JsonObject

# A value of a pipeline recipe may refer to another one, as in `sources: ${stages.corpus.sources}`.
_REFERENCE = r"^\$\{[\w.-]+\}$"


@dataclass(frozen=True, slots=True)
class Described:
    """A configuration type whose schema can be printed.

    Attributes:
        module: module of the type.
        type: name of the type.
        what: what the type describes, as a phrase.
        reference: regular expression of references that may replace any value, if there are any.
    """

    module: str
    type: str
    what: str
    reference: str | None = None


SCHEMAS = {
    "train": Described("easyllm.pipeline.recipe", "TrainConfig", "a training recipe"),
    "run": Described("easyllm.pipeline.recipe", "Recipe", "a pipeline recipe", _REFERENCE),
    "data-build": Described("easyllm.corpus.config", "CorpusConfig", "a corpus recipe"),
    "model": Described("easyllm.nn.config", "ModelConfig", "the parts of a model"),
    "sampling": Described("easyllm.engine.params", "SamplingParams", "sampling parameters"),
    "engine": Described("easyllm.engine.options", "LLMOptions", "options of the engine"),
    "chat-request": Described(
        "easyllm.serve.openai.chat_request", "ChatRequest", "a request to /v1/chat/completions"
    ),
}


def register(app: typer.Typer) -> None:
    """Adds the `schema` command to `app`."""
    app.command("schema")(schema)


def schema(
    name: Annotated[
        str | None, typer.Argument(metavar="|".join(SCHEMAS), help="By default, list the names.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=home_path, help="Write the schema to this file."),
    ] = None,
) -> None:
    """Print the JSON Schema of a recipe or request, with descriptions, for editors.

    An editor with a YAML language server completes and checks a recipe whose first line names the
    schema's file: # yaml-language-server: $schema=train.schema.json

    [bold]Examples[/bold]

        easyllm schema

        easyllm schema train --output train.schema.json

        easyllm schema chat-request
    """
    from easyllm.core.atomic import write_json
    from easyllm.core.errors import ConfigError, suggest

    if name is None:
        if output is not None:
            raise ConfigError(f"--output needs the name of a schema: {', '.join(SCHEMAS)}")
        print_pairs({name: each.what for name, each in SCHEMAS.items()})
        return
    if name not in SCHEMAS:
        raise ConfigError(
            f"schema {name!r} is not known{suggest(name, SCHEMAS)}; use {', '.join(SCHEMAS)}"
        )
    if output is None:
        print_json(schema_of(name))
    else:
        write_json(output, schema_of(name))


def schema_of(name: str, *, references: bool = True) -> JsonObject:
    """Returns the JSON Schema with a name of `SCHEMAS`.

    Args:
        name: the name.
        references: whether values may be references, in recipes that have them.
    """
    from easyllm.core.json_schema import json_schema

    found = SCHEMAS[name]
    annotation = getattr(import_module(found.module), found.type)
    return json_schema(annotation, reference=found.reference if references else None)
