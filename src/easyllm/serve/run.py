"""Runs the server: its listening socket, its limits on slow clients, and its shutdown."""

import errno
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette

from easyllm.core.errors import ConfigError
from easyllm.engine.llm import LLM
from easyllm.serve.app import create_app
from easyllm.serve.connection import KEEP_ALIVE_S, BoundedProtocol, BoundedServer
from easyllm.serve.documents import Documents
from easyllm.serve.history import History
from easyllm.serve.limits import ServeLimits
from easyllm.serve.models import Loader
from easyllm.serve.request_log import RequestLog
from easyllm.serve.service import ServerShuttingDown

if TYPE_CHECKING:
    from easyllm.serve.watch import WatchedRun  # imports the training package


DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8420


def serve(
    models: Mapping[str, LLM],
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    api_key: str | None = None,
    limits: ServeLimits | None = None,
    adapters: Mapping[str, str] | None = None,
    allowed_hosts: Collection[str] = (),
    log: RequestLog | None = None,
    loaders: Mapping[str, Loader] | None = None,
    adapters_folder: Path | None = None,
    history: History | None = None,
    watched: "Mapping[str, WatchedRun] | None" = None,
    documents: Documents | None = None,
    listener: socket.socket | None = None,
) -> None:
    """Serves the models until interrupted.

    Args:
        models: the served models by name.
        host: address to listen on.
        port: port to listen on.
        api_key: if set, required by every route except `/health` and the chat page.
        limits: timeouts and bounds; by default `ServeLimits()`.
        adapters: as for `create_app`.
        allowed_hosts: as for `create_app`; `host` is allowed too.
        log, loaders, adapters_folder, history, watched, documents: as for `create_app`.
        listener: a socket that `bind` returned for `host` and `port`; by default a new one.

    Raises:
        ConfigError: the port is in use, or the key cannot be sent in a header.
    """
    listener = listener or bind(host, port)
    server = build_server(
        models,
        api_key=api_key,
        limits=limits,
        adapters=adapters,
        allowed_hosts=(host, *allowed_hosts),
        log=log,
        loaders=loaders,
        adapters_folder=adapters_folder,
        history=history,
        watched=watched,
        documents=documents,
    )
    server.run(sockets=[listener])


def build_server(
    models: Mapping[str, LLM],
    *,
    api_key: str | None = None,
    limits: ServeLimits | None = None,
    adapters: Mapping[str, str] | None = None,
    allowed_hosts: Collection[str] = (),
    log: RequestLog | None = None,
    loaders: Mapping[str, Loader] | None = None,
    adapters_folder: Path | None = None,
    history: History | None = None,
    watched: "Mapping[str, WatchedRun] | None" = None,
    documents: Documents | None = None,
) -> BoundedServer:
    """Builds a server for the models that enforces the timeouts in `limits`.

    Raises:
        ConfigError: the key cannot be sent in a header.
    """
    limits = limits or ServeLimits()
    app = create_app(
        models,
        api_key=api_key,
        adapters=adapters,
        allowed_hosts=allowed_hosts,
        limits=limits,
        log=log,
        loaders=loaders,
        adapters_folder=adapters_folder,
        history=history,
        watched=watched,
        documents=documents,
    )

    def end_requests() -> None:
        for service in app.state.models.services:
            service.end(ServerShuttingDown("the server is shutting down; try again later"))

    return BoundedServer(server_config(app, limits), limits=limits, end_requests=end_requests)


def server_config(app: Starlette, limits: ServeLimits) -> uvicorn.Config:
    """Returns uvicorn's configuration for an application."""
    protocol = type("_Protocol", (BoundedProtocol,), {"limits": limits})
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",  # uvicorn takes uvloop where another package, such as Ray Serve, brought it
        timeout_keep_alive=KEEP_ALIVE_S,
        log_level="warning",
    )


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket, so that a port conflict shows before any model is loaded.

    Raises:
        ConfigError: the port is in use or not allowed, or the host is not this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets that name their protocol; without it, each response
    # waits 40 ms for the client's delayed acknowledgement of its head
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except (OSError, UnicodeError) as error:
        listener.close()
        not_a_host = isinstance(error, UnicodeError | socket.gaierror)
        if not_a_host or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"cannot listen on host {host!r}, which is not an address of this machine; choose "
                "another with --host, such as 127.0.0.1, or 0.0.0.0 for all"
            ) from None
        reason = getattr(error, "strerror", error)
        raise ConfigError(
            f"cannot listen on {host}:{port} ({reason}); choose another port with --port"
        ) from None
    return listener
