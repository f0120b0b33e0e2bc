"""Routes of the server's own page, under `/easyllm`: the engine view and the history."""

import asyncio
import re
from collections.abc import Awaitable, Callable

from pydantic import Field
from starlette.requests import Request

from easyllm.core.json_types import JsonObject
from easyllm.serve.body import parse_object, read_body
from easyllm.serve.endpoint import Endpoint
from easyllm.serve.errors import APIError
from easyllm.serve.history import History, RevisionConflict
from easyllm.serve.json_text import JSONResponse
from easyllm.serve.treatment import Strict, read_as

PREFIX = "/easyllm"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class StoredConversation(Strict):
    """The body of a request that stores a conversation."""

    revision: int = Field(ge=0, description="Revision of the copy that was changed; 0 if new.")
    conversation: JsonObject = Field(description="The conversation, in the page's format.")


def own_endpoints(
    engines: Callable[[], Awaitable[JsonObject]],
    history: History | None,
    *,
    documents: bool = False,
) -> list[Endpoint]:
    """Returns the routes of the engine view, and those of the history if there is one.

    Args:
        engines: returns the engine view.
        history: the stored conversations.
        documents: whether answers come from an index, which the page then shows.
    """

    async def page() -> JSONResponse:
        return JSONResponse({"history": history is not None, "documents": documents})

    async def engine() -> JSONResponse:
        return JSONResponse(await engines())

    found = [
        Endpoint(method="GET", path=f"{PREFIX}/page", answer=page, documented=None),
        Endpoint(method="GET", path=f"{PREFIX}/engine", answer=engine, documented=None),
    ]
    return found if history is None else [*found, *_history_endpoints(history)]


def _history_endpoints(history: History) -> list[Endpoint]:
    async def search(q: str | None = None) -> JSONResponse:
        found = await asyncio.to_thread(history.search, q or "")
        return JSONResponse({"conversations": found})

    async def one(id: str) -> JSONResponse:
        found = await asyncio.to_thread(history.get, _checked(id))
        if found is None:
            raise _missing(id)
        return JSONResponse({"revision": found[0], "conversation": found[1]})

    async def store(http: Request, id: str) -> JSONResponse:
        raw = await read_body(http)
        body = await asyncio.to_thread(lambda: read_as(StoredConversation, parse_object(raw)))
        if body.conversation.get("id") != _checked(id):
            message = "the conversation's id is not that of the path; send it under its own id"
            raise APIError(400, message, param="conversation", code="invalid_value")
        try:
            revision = await asyncio.to_thread(
                lambda: history.put(id, body.conversation, revision=body.revision)
            )
        except RevisionConflict:
            message = f"conversation {id!r} was changed elsewhere; read it, merge, and store again"
            raise APIError(409, message, param="revision", code="conflict") from None
        return JSONResponse({"revision": revision})

    async def remove(id: str) -> JSONResponse:
        if not await asyncio.to_thread(history.delete, _checked(id)):
            raise _missing(id)
        return JSONResponse({"id": id, "deleted": True})

    path, each = f"{PREFIX}/history", f"{PREFIX}/history/{{id}}"
    return [
        Endpoint(method="GET", path=path, answer=search, documented=None),
        Endpoint(method="GET", path=each, answer=one, documented=None),
        Endpoint(method="PUT", path=each, answer=store, documented=None),
        Endpoint(method="DELETE", path=each, answer=remove, documented=None),
    ]


def _checked(id: str) -> str:
    """Returns an id that the page can have made.

    Raises:
        APIError: it is none.
    """
    if not _ID.fullmatch(id):
        raise APIError(400, "an id has 1 to 64 letters, digits, - and _", code="invalid_value")
    return id


def _missing(id: str) -> APIError:
    return APIError(404, f"there is no conversation {id!r}", code="not_found")
