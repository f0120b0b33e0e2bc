"""The `easyllm serve` command."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyllm.cli.adapter import AdapterFolder, load_served
from easyllm.cli.sampling import (
    CacheDtype,
    CacheGb,
    Deterministic,
    Draft,
    Dtype,
    Quantize,
)

if TYPE_CHECKING:
    from easyllm.serve.limits import ServeLimits


def register(app: typer.Typer) -> None:
    """Adds the `serve` command to `app`."""
    app.command("serve")(serve)


def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="smollm2, a folder ...; or NAME=MODEL."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8420,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="EASYLLM_API_KEY", help="API key required of clients."),
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, help="Maximum number of concurrent requests per model.")
    ] = 64,
    read_timeout: Annotated[
        float, typer.Option(help="Maximum seconds for a request to arrive completely.")
    ] = 60.0,
    write_timeout: Annotated[
        float, typer.Option(help="Seconds after which a client that reads nothing is dropped.")
    ] = 60.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds running requests may take to finish on shutdown.")
    ] = 10.0,
    draft: Draft = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    cache_gb: CacheGb = None,
    cache_dtype: CacheDtype = None,
    deterministic: Deterministic = False,
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
    from easyllm.core.errors import ConfigError
    from easyllm.serve.limits import ServeLimits

    timeouts = {
        "read_timeout_s": read_timeout,
        "write_timeout_s": write_timeout,
        "drain_timeout_s": drain_timeout,
    }
    limits = validate(ServeLimits, timeouts, source="serving options")
    named: dict[str, str] = {}
    for word in models:
        name, equals, source = word.partition("=")
        source = source if equals else word
        name = name if equals else word.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
        if not name or not source:
            raise ConfigError(f"{word!r} is not a model; write MODEL or NAME=MODEL")
        if name in named:
            raise ConfigError(f"two models are named {name!r}; rename one with NAME=MODEL")
        named[name] = source
    options = {
        "max_running": max_running,
        "draft": draft,
        "dtype": dtype,
        "quantize": quantize,
        "cache_gb": cache_gb,
        "cache_dtype": cache_dtype,
        "deterministic": deterministic,
        "adapter": adapter,
    }
    start(named, host=host, port=port, api_key=api_key, limits=limits, **options)


def start(
    named: dict[str, str],
    *,
    host: str,
    port: int,
    api_key: str | None = None,
    limits: "ServeLimits | None" = None,
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
