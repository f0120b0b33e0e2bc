"""Responses kept in memory, so that a later request can continue them."""

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass

from easyllm.core.json_types import JsonObject
from easyllm.serve.errors import APIError

MAX_RESPONSES = 1_000
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the conversation that led to it.

    Attributes:
        body: the response.
        items: the input items of the whole conversation, without the response's own output.
        size: bytes of both as JSON.
    """

    body: JsonObject
    items: list[JsonObject]
    size: int


class ResponseStore:
    """The latest responses, bounded in number and size; the oldest are dropped.

    Args:
        max_responses: maximum number of responses.
        max_bytes: maximum size of all responses and their conversations, as JSON.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._items: dict[str, JsonObject] = {}
        self._size, self._lock = 0, threading.Lock()

    def add(self, body: JsonObject, items: list[JsonObject]) -> None:
        """Keeps a response; one that is larger than the bound is not kept."""
        size = len(json.dumps([body, items]))
        with self._lock:
            if size > self._max_bytes:
                return
            self._kept[body["id"]] = StoredResponse(body, items, size)
            self._items |= {item["id"]: item for item in body["output"]}
            self._size += size
            while self._size > self._max_bytes or len(self._kept) > self._max_responses:
                self._drop(next(iter(self._kept)))

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """Returns a response.

        Args:
            response_id: id of the response.
            param: the request field that contains the id, for the error.

        Raises:
            APIError: it is not kept.
        """
        with self._lock:
            found = self._kept.get(response_id)
        if found is None:
            raise APIError(
                404,
                f"there is no response {response_id!r}; responses are kept in memory, unless store "
                "is false, until newer ones need their place",
                param=param,
                code="not_found",
            )
        return found

    def delete(self, response_id: str) -> None:
        """Removes a response.

        Raises:
            APIError: it is not kept.
        """
        self.get(response_id)
        with self._lock:
            if response_id in self._kept:
                self._drop(response_id)

    def resolve(self, items: list[JsonObject]) -> list[JsonObject]:
        """Returns the items with references replaced by the items that they name.

        Raises:
            APIError: an item is not kept.
        """
        return [
            self._resolved(item) if item["type"] == "item_reference" else item for item in items
        ]

    def _resolved(self, reference: JsonObject) -> JsonObject:
        with self._lock:
            found = self._items.get(reference["id"])
        if found is None:
            message = f"there is no item {reference['id']!r}; send the item itself"
            raise APIError(404, message, param="input", code="not_found")
        return found

    def _drop(self, response_id: str) -> None:
        dropped = self._kept.pop(response_id)
        self._size -= dropped.size
        for item in dropped.body["output"]:
            self._items.pop(item["id"], None)


class NoStore(ResponseStore):
    """Keeps nothing: where requests reach different processes, one would miss another's responses.

    Args:
        why: completes "responses are not kept ...", in errors.
    """

    def __init__(self, why: str) -> None:
        super().__init__()
        self._why = why

    def add(self, body: JsonObject, items: list[JsonObject]) -> None:
        """Drops a response."""

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """Refuses, because nothing is kept.

        Raises:
            APIError: always.
        """
        what = f"response {response_id!r} is not here: responses are not kept {self._why}"
        message = f"{what}; send the whole conversation as input"
        raise APIError(400, message, param=param, code="unsupported_parameter")
