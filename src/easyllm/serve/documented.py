"""`/openapi.json`: the routes, the requests they accept, and every status they return."""

from collections.abc import Sequence

from fastapi import FastAPI

from easyllm.core.json_types import JsonObject
from easyllm.serve.openai.chat_answers import ChatCompletion
from easyllm.serve.errors import ErrorBody
from easyllm.serve.openai.chat_request import ChatRequest

_REFERENCE = "#/components/schemas/{model}"
_REASONS = {
    400: "a field is invalid or the request is malformed; `param` names the field",
    401: "the API key is missing or wrong",
    404: "the model is not served",
    408: "the request did not arrive in time",
    413: "the request is too large",
    415: "the body is not declared as JSON",
    500: "the server failed; see its log",
    503: "the server is shutting down",
}
_ALWAYS = (400, 408, 413, 500, 503)


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


def chat_answers(*, with_key: bool) -> dict[int | str, JsonObject]:
    """Returns the responses of the chat route: an object, an event stream, or an error."""
    events = {"example": "data: {...}\n\ndata: [DONE]\n\n"}
    answer = {
        "model": ChatCompletion,
        "description": "the completion, or with `stream` its chunks",
        "content": {"text/event-stream": events},
    }
    return {200: answer, **errors(404, 415, with_key=with_key)}


CHAT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _REFERENCE.format(model="ChatRequest")}}
        },
    }
}


def document(app: FastAPI, models: Sequence[str], *, with_key: bool) -> None:
    """Makes `app.openapi()` describe the requests and responses of this server.

    The description includes the names of the models and whether an API key is required.
    """
    generate = app.openapi

    def openapi() -> JsonObject:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = generate()
        components = schema.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        chat = ChatRequest.model_json_schema(ref_template=_REFERENCE)
        chat["properties"]["model"]["enum"] = list(models)
        schemas.update(chat.pop("$defs", {}))
        schemas["ChatRequest"] = chat
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

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
