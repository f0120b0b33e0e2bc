"""The `easyllm serve` command."""

import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyllm.cli.adapter import AdapterFolder, load_served
from easyllm.cli.options import FlagGroup, Values, checked_flags, with_flags
from easyllm.cli.output import home_path
from easyllm.cli.sampling import BATCH, LOADING
from easyllm.core.json_types import JsonObject
from easyllm.serve.limits import ServeLimits

if TYPE_CHECKING:
    from easyllm.serve.documents import Documents
    from easyllm.serve.watch import WatchedRun

TIMEOUTS = FlagGroup(
    ServeLimits,
    *("read_timeout_s", "write_timeout_s", "drain_timeout_s"),
    flags={
        "read_timeout_s": "--read-timeout",
        "write_timeout_s": "--write-timeout",
        "drain_timeout_s": "--drain-timeout",
    },
)
QUEUE = FlagGroup(
    ServeLimits, "max_waiting", "unload_idle_s", flags={"unload_idle_s": "--unload-idle"}
)
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port of the server and its chat page.")]

AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        help="Host name by which clients may address the server without an API key, in "
        "addition to localhost and IP addresses; * allows all.",
        metavar="NAME",
    ),
]
AdaptersFolder = Annotated[
    Path | None,
    typer.Option(
        callback=home_path,
        help="Folder from which requests may load adapters (POST /v1/load_lora_adapter).",
        metavar="FOLDER",
    ),
]
System = Annotated[
    str,
    typer.Option(
        metavar="TEXT|NAME|FILE",
        help="System message of conversations that begin with none of their own: a text, a "
        "structured prompt by name (easyllm prompt new lists them), or a .md file.",
    ),
]
HistoryFile = Annotated[
    Path | None,
    typer.Option(
        callback=home_path,
        help="SQLite file that stores the conversations of the chat page; without it they stay "
        "in the browser.",
        metavar="FILE",
    ),
]
WatchedRuns = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder of a training run, or NAME=FOLDER: its newest checkpoint is served too, "
        "also during the run.",
        metavar="FOLDER",
    ),
]
Replicas = Annotated[
    int,
    typer.Option(
        min=1,
        max=1024,
        help="Copies of the models, as replicas of Ray Serve on this machine, or on the "
        "cluster that RAY_ADDRESS names; 1 needs no Ray.",
    ),
]


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
    allowed_host: AllowedHosts = None,
    adapters_folder: AdaptersFolder = None,
    system: System = "",
    history: HistoryFile = None,
    watch: WatchedRuns = None,
    replicas: Replicas = 1,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Write the line of each request as JSON.")
    ] = False,
    batch: Annotated[Values, BATCH],
    queue: Annotated[Values, QUEUE],
    timeouts: Annotated[Values, TIMEOUTS],
    loading: Annotated[Values, LOADING],
    adapter: AdapterFolder = None,
) -> None:
    """Serve models over the APIs of OpenAI and Anthropic, with a chat page.

    Routes: /v1/chat/completions, /v1/completions, /v1/responses, /v1/embeddings, /v1/messages,
    /v1/models, /tokenize, /detokenize, /apply-template, /metrics, /health; /openapi.json describes
    them.

    [bold]Examples[/bold]

        easyllm serve smollm2

        easyllm serve base=smollm2 tuned=runs/quickstart/merged --port 9000

        easyllm serve base=smollm2 tuned=runs/mine/adapter

        easyllm serve smollm2 --quantize int4

        easyllm serve smollm2 --system assistant

        easyllm serve base=smollm2 --watch runs/mine

        easyllm serve smollm2 --history chats.sqlite

        easyllm serve smollm2 --replicas 2

        easyllm serve smollm2 --host 0.0.0.0 --api-key KEY --log-json
    """
    from easyllm.prompt.library import system_message

    limits = checked_flags(
        ServeLimits, {**timeouts, **queue}, TIMEOUTS, QUEUE, source="serving options"
    )
    instruction: Values = {"system": system_message(system)} if system else {}
    start(
        _by_name(models),
        host=host,
        port=port,
        api_key=api_key,
        limits=limits,
        adapter=adapter,
        allowed_hosts=tuple(allowed_host or ()),
        adapters_folder=adapters_folder,
        log_json=log_json,
        **instruction,
        history=history,
        watch=_by_name(watch or []),
        replicas=replicas,
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
    allowed_hosts: tuple[str, ...] = (),
    adapters_folder: Path | None = None,
    log_json: bool = False,
    history: Path | None = None,
    watch: dict[str, str] | None = None,
    replicas: int = 1,
    open_documents: Callable[[], "Documents"] | None = None,
    **options: Any,
) -> None:
    """Loads models and serves them until interrupted; `options` apply to every engine.

    With `open_documents`, questions are answered from the index that it opens.

    Raises:
        ConfigError: the port is in use, the key cannot be sent in a header, or the history cannot
            be used.
    """
    from easyllm.core.garbage import importing

    with importing():
        from easyllm.serve import run as running
        from easyllm.serve.guard import check_key
        from easyllm.serve.history import History
        from easyllm.serve.request_log import RequestLog, log_to_stderr

    check_key(api_key)  # fail before the models are loaded
    with running.bind(host, port) as listener:  # who connects now is answered once they are loaded
        _check_folder(adapters_folder)
        shared: JsonObject = {
            "listener": listener,
            "limits": limits or ServeLimits(),
            "api_key": api_key,
            "log": RequestLog(json_lines=log_json),
            "history": None if history is None else History(history),
        }
        documents = None if open_documents is None else open_documents()
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}/  (Ctrl-C stops)"
        if replicas > 1:
            _refuse_with_replicas({"--adapters-folder": adapters_folder, "--watch": watch})
            sys.stderr.write(f"{replicas} replicas of {', '.join(named)} at {where}\n")
            log_to_stderr()
            shared["allowed_hosts"] = (host, *allowed_hosts)
            _serve_replicas(named, replicas, options=options, **shared)
            return
        served = load_served(named, **options)
        watched = _watched(watch or {}, options, taken=named)
        served.models |= {name: run.llm for name, run in watched.items()}
        sys.stderr.write(f"serving {', '.join(served.models)} at {where}\n")
        log_to_stderr()
        running.serve(
            served.models,
            host=host,
            port=port,
            adapters=served.adapters,
            loaders=served.loaders,
            adapters_folder=adapters_folder,
            allowed_hosts=allowed_hosts,
            watched=watched,
            documents=documents,
            **shared,
        )


def _check_folder(adapters_folder: Path | None) -> None:
    """Checks that the folder of adapters exists.

    Raises:
        ConfigError: it does not.
    """
    from easyllm.core.errors import ConfigError

    if adapters_folder is not None and not adapters_folder.is_dir():
        raise ConfigError(f"--adapters-folder: there is no folder {str(adapters_folder)!r}")


def _refuse_with_replicas(flags: dict[str, object]) -> None:
    """Refuses options that would change one replica only.

    Raises:
        ConfigError: one of the options is given.
    """
    from easyllm.core.errors import ConfigError

    for flag, given in flags.items():
        if given:
            raise ConfigError(
                f"{flag} does not work with --replicas, because weights would be loaded in one "
                "replica only; remove one of the two options"
            )


def _watched(
    folders: dict[str, str], options: JsonObject, *, taken: Collection[str]
) -> dict[str, "WatchedRun"]:
    """Returns the training runs to serve, by name; options about loading weights do not apply.

    Raises:
        ConfigError: a name is taken, or a folder contains no run.
    """
    from easyllm.core.errors import ConfigError
    from easyllm.core.paths import expanded
    from easyllm.engine.options import EngineConfig
    from easyllm.serve.watch import WatchedRun

    for name in folders:
        if name in taken:
            raise ConfigError(f"two models are named {name!r}; rename one with NAME=FOLDER")
    of_engine = {k: v for k, v in options.items() if k in EngineConfig.model_fields}
    return {name: WatchedRun(expanded(Path(f)), of_engine) for name, f in folders.items()}


def _serve_replicas(
    named: dict[str, str], replicas: int, *, options: JsonObject, **others: Any
) -> None:
    """Serves models with replicas; a model that does not exist is refused before Ray starts."""
    from easyllm.models import split_adapter
    from easyllm.serve.replicas import serve_replicas
    from easyllm.serve.replicas.replica import Sources

    for source in named.values():
        split_adapter(source, options.get("adapter"))
    serve_replicas(Sources(load=partial(load_served, named, **options)), replicas, **others)


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
