"""Starts the replicas on Ray Serve, and the front that answers the clients."""

import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import ExitStack
from functools import partial
from socket import socket

from starlette.applications import Starlette

from easyllm.core.cluster import connect_ray, cpus_each
from easyllm.core.errors import ConfigError, install
from easyllm.core.json_types import JsonObject
from easyllm.serve.connection import BoundedServer
from easyllm.serve.history import History
from easyllm.serve.limits import ServeLimits
from easyllm.serve.replicas.board import Board, Report
from easyllm.serve.replicas.front import Replicas, Stream, create_front
from easyllm.serve.replicas.replica import ForwardedRequest, Replica, Sources
from easyllm.serve.request_log import RequestLog
from easyllm.serve.run import server_config

logger = logging.getLogger(__name__)
APP = "easyllm"
MAX_ONGOING = 4096
"""Requests that Ray Serve gives a replica at once: the replica's own limit, `max_waiting`, is what
refuses requests."""


def serve_replicas(
    sources: Sources,
    replicas: int,
    *,
    listener: socket,
    limits: ServeLimits,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
    log: RequestLog | None = None,
    history: History | None = None,
) -> None:
    """Serves models with replicas until interrupted.

    Args:
        sources: the models; each replica loads them.
        replicas: number of replicas.
        listener: the listening socket.
        limits: timeouts, of the front; bounds on waiting requests, of each replica.
        api_key, allowed_hosts, log, history: as for `create_app`.

    Raises:
        ConfigError: Ray is not installed, or the replicas cannot be started.
    """
    with ExitStack() as stack:
        started = start_replicas(sources, replicas, limits=limits, stack=stack)
        app = create_front(
            started, api_key=api_key, allowed_hosts=allowed_hosts, log=log, history=history
        )
        build_front_server(app, limits).run(sockets=[listener])


def build_front_server(app: Starlette, limits: ServeLimits) -> BoundedServer:
    """Returns the server of the front, with the timeouts in `limits`."""
    return BoundedServer(server_config(app, limits), limits=limits, end_requests=lambda: None)


def start_replicas(
    sources: Sources, replicas: int, *, limits: ServeLimits, stack: ExitStack
) -> Replicas:
    """Starts the replicas and returns how to reach them.

    Args:
        sources, replicas, limits: as for `serve_replicas`.
        stack: stops them when it is closed.

    Raises:
        ConfigError: Ray is not installed, or the replicas cannot be started.
    """
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"--replicas needs Ray Serve ({error}); {install('ray')}") from None
    if not ray.is_initialized():
        connect_ray()
        stack.callback(ray.shutdown)
    serve.start(proxy_location="Disabled")  # the front answers clients
    stack.callback(serve.shutdown)
    board = ray.remote(Board).options(num_cpus=0).remote()

    async def put(replica: str, metrics: str, view: JsonObject) -> None:
        await board.put.remote(replica, metrics, view)

    nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    gpus = sum(each.get("GPU", 0) for each in nodes) >= replicas
    deployment = serve.deployment(
        _deployed(put),
        name="Replica",
        num_replicas=replicas,
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=2,
        ray_actor_options={
            "num_cpus": cpus_each([each.get("CPU", 0) for each in nodes], replicas),
            "num_gpus": 1 if gpus else 0,
        },
    )
    try:
        handle = serve.run(deployment.bind(sources, limits), name=APP, route_prefix=None)
    except RuntimeError as error:
        said = serve.status().applications[APP].deployments.values()
        lines = [line for each in said for line in each.message.splitlines() if line.strip()]
        reason = lines[-1] if lines else str(error)
        raise ConfigError(
            f"the replicas could not be started ({reason}); Ray's log has the traceback"
        ) from None

    def send(request: ForwardedRequest) -> Stream:
        found: Stream = handle.options(stream=True).answer.remote(request)
        return found

    async def reports() -> dict[str, Report]:
        found: dict[str, Report] = await board.get.remote()
        return found

    return Replicas(send=send, died=(ray.exceptions.RayActorError,), reports=reports)


def _deployed(put: Callable[[str, str, JsonObject], Awaitable[None]]) -> type[Replica]:
    """Returns the class of the replicas, which put their numbers on the board."""

    class Deployed(Replica):
        def __init__(self, sources: Sources, limits: ServeLimits) -> None:
            from ray import serve

            own = serve.get_replica_context().replica_id.unique_id
            super().__init__(sources, limits, partial(put, own))

    return Deployed
