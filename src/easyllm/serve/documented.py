"""`/openapi.json`: the routes, the requests they accept, and every status they return."""

from collections.abc import Sequence

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode

from easyllm.core.json_types import JsonObject
from easyllm.serve.endpoint import Endpoint
from easyllm.serve.errors import AnthropicErrorBody, ErrorBody, is_anthropic
from easyllm.serve.routes import POSTS, RAG_POSTS

_REFERENCE = "#/components/schemas/{model}"
_REASONS = {
    400: "a field is invalid or the request is malformed; `param` names the field",
    401: "the API key is missing or wrong",
    404: "the model is not served",
    408: "the request did not arrive in time",
    413: "the request is too large",
    403: "the host is not served, or adapters cannot be loaded by request",
    415: "the body is not declared as JSON",
    429: "too many requests are waiting",
    500: "the server failed; see its log",
    503: "the server is shutting down",
}
_ALWAYS = (400, 403, 408, 413, 500, 503)


def errors(*statuses: int, with_key: bool) -> dict[int | str, JsonObject]:
    """Returns the error responses of a route in the format FastAPI expects.

    Args:
        statuses: statuses of this route, added to those that any route may return.
        with_key: whether the route requires an API key, and so may return 401.
    """
    wanted = {*statuses, *_ALWAYS, *([401] if with_key else [])}
    return {
        status: {"model": ErrorBody, "description": _REASONS[status]} for status in sorted(wanted)
    }


def answers_of(path: str, *, with_key: bool) -> dict[int | str, JsonObject]:
    """Returns the responses of a route that reads a JSON object: an answer, or an error."""
    answer: JsonObject = {"description": "the answer"}
    if path in STREAMED:
        events = {"example": STREAMED[path]}
        answer = {
            "description": "the answer, or with `stream` its events",
            "content": {"text/event-stream": events},
        }
    body = AnthropicErrorBody if is_anthropic(path) else ErrorBody
    found = errors(404, 415, 429, with_key=with_key)
    return {200: answer} | {status: {**each, "model": body} for status, each in found.items()}


STREAMED = {
    "/v1/chat/completions": "data: {...}\n\ndata: [DONE]\n\n",
    "/v1/completions": "data: {...}\n\ndata: [DONE]\n\n",
    "/v1/responses": "event: response.created\ndata: {...}\n\n",
    "/v1/messages": "event: message_start\ndata: {...}\n\n",
}
"""Routes that may answer with server-sent events, with an example."""


def body_of(model: type[BaseModel]) -> JsonObject:
    """Returns the description of a route's JSON body."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(endpoints: Sequence[Endpoint], models: Sequence[str], *, with_key: bool) -> JsonObject:
    """Returns `/openapi.json`: the routes, with their requests and responses.

    Args:
        endpoints: the routes.
        models: the names of the served models.
        with_key: whether an API key is required.
    """
    from easyllm.serve.answer_schemas import ANSWERS  # not imported when a server starts

    schema = _routes(endpoints)
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for (method, path), model in ANSWERS.items():
        content = schema["paths"][path][method]["responses"]["200"].setdefault("content", {})
        content["application/json"] = {"schema": _added(schemas, model, mode="serialization")}
    posts = POSTS | {path: how for path, how in RAG_POSTS.items() if path in schema["paths"]}
    for request, *_ in posts.values():
        _added(schemas, request, mode="validation")
        fields = schemas[request.__name__]["properties"]
        if "model" in fields:
            fields["model"]["enum"] = list(models)
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own format, never sent
        schemas.pop(name, None)
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if with_key and path != "/health":
                operation["security"] = [{"bearer": []}, {"header": []}]
    if with_key:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        }
    return schema


def _added(schemas: JsonObject, model: type[BaseModel], *, mode: JsonSchemaMode) -> JsonObject:
    """Adds a model and those in it to the schemas; returns a reference to it."""
    found = model.model_json_schema(ref_template=_REFERENCE, mode=mode)
    schemas.update(found.pop("$defs", {}))
    schemas[model.__name__] = found
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def _routes(endpoints: Sequence[Endpoint]) -> JsonObject:
    """Returns FastAPI's description of the routes."""
    from fastapi import FastAPI  # see `endpoint`

    app = FastAPI(title="Easyllm")
    for each in endpoints:
        if each.documented is not None:
            how = dict(each.documented)
            app.add_api_route(each.path, each.answer, methods=[each.method], **how)
    described: JsonObject = app.openapi()
    return described
