"""The `easyllm serve` command."""

import sys
from typing import Annotated, Any

import typer

from easyllm.cli.adapter import AdapterFolder, load_served
from easyllm.cli.options import FlagGroup, Values, with_flags
from easyllm.cli.sampling import LOADING
from easyllm.engine.options import LLMOptions
from easyllm.serve.limits import ServeLimits

TIMEOUTS = FlagGroup(
    ServeLimits,
    *("read_timeout_s", "write_timeout_s", "drain_timeout_s"),
    flags={
        "read_timeout_s": "--read-timeout",
        "write_timeout_s": "--write-timeout",
        "drain_timeout_s": "--drain-timeout",
    },
)
BATCH = FlagGroup(LLMOptions, "max_running")
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port of the server and its chat page.")]


def register(app: typer.Typer) -> None:
    """Adds the `serve` command to `app`."""
    app.command("serve")(serve)


@with_flags
def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="smollm2, a folder ...; or NAME=MODEL."),
    ],
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Port = 8420,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="EASYLLM_API_KEY", help="API key required of clients."),
    ] = None,
    batch: Annotated[Values, BATCH],
    timeouts: Annotated[Values, TIMEOUTS],
    loading: Annotated[Values, LOADING],
    adapter: AdapterFolder = None,
) -> None:
    """Serve models over an OpenAI-compatible API with a chat page.

    [bold]Examples[/bold]

        easyllm serve smollm2

        easyllm serve base=smollm2 tuned=runs/quickstart/merged --port 9000

        easyllm serve base=smollm2 tuned=runs/mine/adapter

        easyllm serve smollm2 --quantize int4
    """
    from easyllm.core.config import validate

    limits = validate(ServeLimits, timeouts, source="serving options")
    start(
        _by_name(models),
        host=host,
        port=port,
        api_key=api_key,
        limits=limits,
        adapter=adapter,
        **batch,
        **loading,
    )


def start(
    named: dict[str, str],
    *,
    host: str,
    port: int,
    api_key: str | None = None,
    limits: ServeLimits | None = None,
    **options: Any,
) -> None:
    """Loads models and serves them until interrupted; `options` apply to every engine.

    Raises:
        ConfigError: the port is in use, or the key cannot be sent in a header.
    """
    from easyllm.serve.app import bind
    from easyllm.serve.app import serve as run_server
    from easyllm.serve.guard import check_key

    check_key(api_key)  # fail before the models are loaded
    bind(host, port).close()
    loaded, adapters = load_served(named, **options)
    shown = f"[{host}]" if ":" in host else host
    sys.stderr.write(f"serving {', '.join(loaded)} at http://{shown}:{port}/  (Ctrl-C stops)\n")
    run_server(loaded, host=host, port=port, api_key=api_key, limits=limits, adapters=adapters)


def _by_name(words: list[str]) -> dict[str, str]:
    """Returns the models' sources by the names under which they are served.

    Raises:
        ConfigError: a word names no model, or two models have the same name.
    """
    from easyllm.core.errors import ConfigError

    named: dict[str, str] = {}
    for word in words:
        name, equals, source = word.partition("=")
        source = source if equals else word
        name = name if equals else word.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
        if not name or not source:
            raise ConfigError(f"{word!r} is not a model; write MODEL or NAME=MODEL")
        if name in named:
            raise ConfigError(f"two models are named {name!r}; rename one with NAME=MODEL")
        named[name] = source
    return named
