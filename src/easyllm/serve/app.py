"""The HTTP application: the dialects of the API, health, metrics and the chat page."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as RoutingError
from starlette.requests import Request
from starlette.responses import Response

from easyllm.engine.llm import LLM
from easyllm.serve.documented import answers_of, body_of, describe, errors
from easyllm.serve.documents import Documents
from easyllm.serve.endpoint import Endpoint
from easyllm.serve.engine_view import engine_view
from easyllm.serve.errors import APIError, on_api_error, on_exception, on_routing_error
from easyllm.serve.guard import Guard, check_key
from easyllm.serve.history import History
from easyllm.serve.json_text import JSONResponse
from easyllm.serve.limits import ServeLimits
from easyllm.serve.metrics import Metrics
from easyllm.serve.models import Loader, ServedModels
from easyllm.serve.observe import Observe
from easyllm.serve.openai.chat_answers import Health, ModelEntry, ModelList
from easyllm.serve.own_routes import own_endpoints
from easyllm.serve.page import page_endpoints
from easyllm.serve.request_log import RequestLog
from easyllm.serve.responses.store import ResponseStore
from easyllm.serve.routes import POSTS, RAG_POSTS, Call
from easyllm.serve.tokens import tokenizer_info

if TYPE_CHECKING:
    from easyllm.serve.watch import WatchedRun  # imports the training package


def create_app(
    models: Mapping[str, LLM],
    *,
    api_key: str | None = None,
    adapters: Mapping[str, str] | None = None,
    allowed_hosts: Collection[str] = (),
    limits: ServeLimits | None = None,
    log: RequestLog | None = None,
    loaders: Mapping[str, Loader] | None = None,
    adapters_folder: Path | None = None,
    history: History | None = None,
    responses: ResponseStore | None = None,
    watched: "Mapping[str, WatchedRun] | None" = None,
    documents: Documents | None = None,
) -> Starlette:
    """Builds the server's ASGI application.

    Its `state.models` contains the served models, `state.metrics` their metrics, and
    `state.describe()` returns `/openapi.json`.

    Args:
        models: the served models by name. Several names may share one model.
        api_key: if set, required by every route except `/health` and the chat page.
        adapters: for a served name, the adapter of its model that its requests select; without an
            entry, the base model answers.
        allowed_hosts: host names, in addition to `localhost`, by which clients may address the
            server if there is no API key (`Guard`).
        limits: bounds on waiting requests.
        log: writes a line for each request.
        loaders: for a served name, how its model is loaded again after it was unloaded.
        adapters_folder: the folder from which adapters may be loaded by request; None: none.
        history: where the page's conversations are stored; None leaves them in the browser.
        responses: keeps responses of the Responses API; by default in this process.
        watched: for a served name, the training run whose newest checkpoint it is.
        documents: the index from which questions are answered, or None; adds `/v1/rag/...`.

    Raises:
        ConfigError: the key cannot be sent in a header.
    """
    check_key(api_key)
    with_key, limits = api_key is not None, limits or ServeLimits()
    metrics = Metrics()
    served = ServedModels(
        models,
        adapters=adapters,
        loaders=loaders,
        adapters_folder=adapters_folder,
        metrics=metrics,
    )

    call = Call(served, limits.max_waiting, responses or ResponseStore(), documents)
    posts = POSTS if documents is None else POSTS | RAG_POSTS
    endpoints = [
        *page_endpoints(),
        *own_endpoints(
            partial(engine_view, served, metrics), history, documents=documents is not None
        ),
        *_status_routes(metrics, with_key=with_key),
        *_model_routes(served, watched or {}, with_key=with_key),
        *(_post(call, path, *how, with_key=with_key) for path, how in posts.items()),
        *(_document_routes(documents, with_key=with_key) if documents is not None else []),
        *_stored_responses(call.stored, with_key=with_key),
    ]
    description = cache(partial(describe, endpoints, list(served.names), with_key=with_key))

    async def openapi() -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(description))

    shown = Endpoint(method="GET", path="/openapi.json", answer=openapi, documented=None)
    lifespan = partial(_lifespan, served, limits.unload_idle_s, watched or {})
    app = Starlette(lifespan=lifespan, routes=[each.route() for each in (*endpoints, shown)])
    app.router.redirect_slashes = False
    app.state.models, app.state.metrics, app.state.describe = served, metrics, description
    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(RoutingError, on_routing_error)
    app.add_exception_handler(Exception, on_exception)
    app.add_middleware(Guard, api_key=api_key, allowed_hosts=allowed_hosts)
    app.add_middleware(Observe, metrics=metrics, log=log)  # outermost: it sees what Guard refuses
    return app


@asynccontextmanager
async def _lifespan(
    served: ServedModels,
    idle_s: float | None,
    watched: "Mapping[str, WatchedRun]",
    _: Starlette,
) -> AsyncIterator[None]:
    """Runs what accompanies requests: unloading idle models, following training runs."""
    unloading = None if idle_s is None else asyncio.create_task(served.unload_idle(idle_s))
    tasks = [] if unloading is None else [unloading]
    for name, run in watched.items():
        service = (await served.open(name)).service
        tasks.append(asyncio.create_task(run.follow(service)))
    yield
    for task in tasks:
        task.cancel()
    served.close()


def _status_routes(metrics: Metrics, *, with_key: bool) -> list[Endpoint]:
    """Returns the health check and the metrics."""

    async def health() -> Health:
        return Health()

    async def metrics_page() -> Response:
        return Response(metrics.render(), headers={"content-type": metrics.content_type})

    public, guarded = errors(with_key=False), errors(with_key=with_key)
    return [
        Endpoint(method="GET", path="/health", answer=health, documented={"responses": public}),
        Endpoint(
            method="GET",
            path="/metrics",
            answer=metrics_page,
            documented={"response_class": Response, "responses": guarded},
        ),
    ]


def _model_routes(
    models: ServedModels, watched: "Mapping[str, WatchedRun]", *, with_key: bool
) -> list[Endpoint]:
    """Returns the routes about the served models."""

    async def list_models() -> ModelList:
        return ModelList(data=[_entry(name, models, watched) for name in models.names])

    async def one_model(model_id: str) -> ModelEntry:
        return _entry(model_id, models, watched)

    async def info(model: str | None = None) -> JSONResponse:
        return JSONResponse(tokenizer_info(await models.open(model)))

    always = {"responses": errors(with_key=with_key)}
    with_404 = {"responses": errors(404, with_key=with_key)}
    one = "/v1/models/{model_id:path}"
    return [
        Endpoint(method="GET", path="/v1/models", answer=list_models, documented=always),
        Endpoint(method="GET", path=one, answer=one_model, documented=with_404),
        Endpoint(method="GET", path="/tokenizer_info", answer=info, documented=with_404),
    ]


def _entry(name: str, models: ServedModels, watched: "Mapping[str, WatchedRun]") -> ModelEntry:
    _, found = models.find(name)
    run = watched.get(name)
    return ModelEntry(
        id=name,
        step=None if run is None else run.step,
        scores={} if run is None else run.scores,
        created=found.created,
        max_model_len=found.max_tokens,
        default_sampling=dict(found.defaults),
    )


def _post(
    call: Call, path: str, model: type[BaseModel], name: str, text_field: str, *, with_key: bool
) -> Endpoint:
    """Returns a route that reads a JSON object, and so does not declare its body to FastAPI."""

    async def post(http: Request) -> Response:
        return await call.handle(http, model, getattr(call, name), text_field=text_field)

    documented = {
        "name": name,
        "operation_id": name,
        "response_model": None,
        "responses": answers_of(path, with_key=with_key),
        "openapi_extra": body_of(model),
    }
    return Endpoint(method="POST", path=path, answer=post, documented=documented)


def _document_routes(documents: Documents, *, with_key: bool) -> list[Endpoint]:
    """Returns the route that lists the documents of an index."""

    async def listing() -> JSONResponse:
        return JSONResponse(documents.listing())

    documented = {"responses": errors(with_key=with_key)}
    return [Endpoint(method="GET", path="/v1/rag/documents", answer=listing, documented=documented)]


def _stored_responses(stored: ResponseStore, *, with_key: bool) -> list[Endpoint]:
    """Returns the routes about responses that are kept in memory."""

    async def one_response(response_id: str) -> JSONResponse:
        return JSONResponse(stored.get(response_id).body)

    async def delete_response(response_id: str) -> JSONResponse:
        stored.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    async def input_items(response_id: str) -> JSONResponse:
        items = stored.get(response_id).items
        ids = [item.get("id") for item in items]
        ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
        return JSONResponse({"object": "list", "data": items, "has_more": False, **ends})

    path = "/v1/responses/{response_id}"
    documented = {"responses": errors(404, with_key=with_key)}
    return [
        Endpoint(method="GET", path=path, answer=one_response, documented=documented),
        Endpoint(method="DELETE", path=path, answer=delete_response, documented=documented),
        Endpoint(
            method="GET", path=f"{path}/input_items", answer=input_items, documented=documented
        ),
    ]
