"""A route of the server: its function, and what `/openapi.json` says about it.

Functions have typed parameters and results, from which FastAPI makes the description. The server
itself runs on Starlette and imports FastAPI only to describe itself, because that import takes
longer than reading the weights of a small model.
"""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from easyllm.core.json_types import JsonMapping
from easyllm.serve.json_text import JSONResponse

Answer = Callable[..., Awaitable[Response | BaseModel]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One route.

    Attributes:
        method: the HTTP method.
        path: the path, with parameters in braces.
        answer: returns the response, or a model for its JSON body. The parameter `http` is the
            request; others have the names of path parameters, or else of query parameters, which
            are texts or None.
        documented: arguments of FastAPI's `add_api_route`; None for routes that are not described.
    """

    method: str
    path: str
    answer: Answer
    documented: JsonMapping | None = field(default_factory=dict)

    def route(self) -> Route:
        """Returns the route of a Starlette application."""
        names = tuple(inspect.signature(self.answer).parameters)

        async def run(http: Request) -> Response:
            values: dict[str, object] = {
                name: http.path_params.get(name, http.query_params.get(name)) for name in names
            }
            if "http" in values:
                values["http"] = http
            found = await self.answer(**values)
            if isinstance(found, Response):
                return found
            return JSONResponse(found.model_dump(mode="json"))

        return _NamedRoute(self.path, run, methods=[self.method])


class _NamedRoute(Route):
    """A route that middleware finds in the scope of the requests that it answers."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        if match is not Match.NONE:
            found["route"] = self
        return match, found


__all__ = ["Answer", "Endpoint"]
