"""The HTTP application: the dialects of the API, health, metrics and the chat page."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as RoutingError

from easyllm.engine.llm import LLM
from easyllm.serve.documented import answers_of, body_of, document, errors
from easyllm.serve.errors import APIError, on_api_error, on_exception, on_routing_error
from easyllm.serve.guard import Guard, check_key
from easyllm.serve.limits import ServeLimits
from easyllm.serve.metrics import Metrics
from easyllm.serve.models import Loader, ServedModels
from easyllm.serve.observe import Observe
from easyllm.serve.openai.chat_answers import Health, ModelEntry, ModelList
from easyllm.serve.request_log import RequestLog
from easyllm.serve.responses.store import ResponseStore
from easyllm.serve.routes import POSTS, Call
from easyllm.serve.tokens import tokenizer_info

PAGE = Path(__file__).parent / "web" / "index.html"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
}


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
) -> FastAPI:
    """Builds the server's ASGI application; `state.models` contains the served models.

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

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        idle = limits.unload_idle_s
        unloading = None if idle is None else asyncio.create_task(served.unload_idle(idle))
        yield
        if unloading is not None:
            unloading.cancel()
        served.close()

    app = FastAPI(
        title="Easyllm", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.models = served
    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(RoutingError, on_routing_error)
    app.add_exception_handler(Exception, on_exception)
    app.add_middleware(Guard, api_key=api_key, allowed_hosts=allowed_hosts)
    app.add_middleware(Observe, metrics=metrics, log=log)  # outermost: it sees what Guard refuses
    document(app, list(served.names), with_key=with_key)
    _add_pages(app, metrics, with_key=with_key)
    _add_model_routes(app, served, with_key=with_key)
    call = Call(served, limits.max_waiting, ResponseStore())
    for path, (model, name, text_field) in POSTS.items():
        _add_post(app, call, path, model, name, text_field, with_key=with_key)
    _add_stored_responses(app, call.stored, with_key=with_key)
    return app


def _add_pages(app: FastAPI, metrics: Metrics, *, with_key: bool) -> None:
    """Adds the health check, the metrics and the chat page."""

    @app.get("/health", responses=errors(with_key=False))
    async def health() -> Health:
        return Health()

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, headers=_PAGE_HEADERS)

    @app.get("/metrics", response_class=Response, responses=errors(with_key=with_key))
    async def metrics_page() -> Response:
        return Response(metrics.render(), headers={"content-type": metrics.content_type})


def _add_model_routes(app: FastAPI, models: ServedModels, *, with_key: bool) -> None:
    """Adds the routes about the served models."""

    @app.get("/v1/models", responses=errors(with_key=with_key))
    async def list_models() -> ModelList:
        return ModelList(data=[_entry(name, models) for name in models.names])

    @app.get("/v1/models/{model_id:path}", responses=errors(404, with_key=with_key))
    async def one_model(model_id: str) -> ModelEntry:
        return _entry(model_id, models)

    @app.get("/tokenizer_info", responses=errors(404, with_key=with_key))
    async def info(model: str | None = None) -> JSONResponse:
        return JSONResponse(tokenizer_info(await models.open(model)))


def _entry(name: str, models: ServedModels) -> ModelEntry:
    _, found = models.find(name)
    return ModelEntry(
        id=name,
        created=found.created,
        max_model_len=found.max_tokens,
        default_sampling=dict(found.defaults),
    )


def _add_post(
    app: FastAPI,
    call: Call,
    path: str,
    model: type[BaseModel],
    name: str,
    text_field: str,
    *,
    with_key: bool,
) -> None:
    """Adds a route that reads a JSON object; its body is documented by hand, as it is read so."""

    async def post(http: Request) -> Response:
        return await call.handle(http, model, getattr(call, name), text_field=text_field)

    app.post(
        path,
        name=name,
        operation_id=name,
        response_model=None,
        responses=answers_of(path, with_key=with_key),
        openapi_extra=body_of(model),
    )(post)


def _add_stored_responses(app: FastAPI, stored: ResponseStore, *, with_key: bool) -> None:
    """Adds the routes about responses that are kept in memory."""
    path = "/v1/responses/{response_id}"

    @app.get(path, responses=errors(404, with_key=with_key))
    async def one_response(response_id: str) -> JSONResponse:
        return JSONResponse(stored.get(response_id).body)

    @app.delete(path, responses=errors(404, with_key=with_key))
    async def delete_response(response_id: str) -> JSONResponse:
        stored.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @app.get(f"{path}/input_items", responses=errors(404, with_key=with_key))
    async def input_items(response_id: str) -> JSONResponse:
        items = stored.get(response_id).items
        ids = [item.get("id") for item in items]
        ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
        return JSONResponse({"object": "list", "data": items, "has_more": False, **ends})
