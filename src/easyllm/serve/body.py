"""Strict parsing of a request body as a JSON object.

Anything that two JSON parsers could interpret differently is rejected.
"""

import json
import math
from email.message import Message
from typing import Any, NoReturn

from starlette.requests import Request

from easyllm.core.json_types import JsonObject
from easyllm.serve.errors import APIError

MAX_NUMBER_CHARS = 1000
"""No double needs more than 767 significant digits to be written exactly."""


async def read_body(request: Request) -> bytes:
    """Returns the raw body after checking its content type.

    Raises:
        APIError: the body is not declared as JSON (415), or is empty (400).
        ClientDisconnect: the client disconnected before it had sent the complete body.
    """
    _check_type(request)
    raw = await request.body()
    if not raw.strip():
        raise APIError(400, "the body is empty; send a JSON object")
    return raw


def parse_object(raw: bytes) -> JsonObject:
    """Parses a body as a JSON object.

    Raises:
        APIError: the body is not UTF-8, not valid JSON (RFC 8259) or not an object, contains a
            duplicate key, NaN, infinity or a number that is too long, or is nested too deeply.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body is not UTF-8 (byte {error.start}); send UTF-8") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_number,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise APIError(400, f"the body is not valid JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise APIError(400, "the body is nested too deeply; send a flatter one") from None
    if not isinstance(value, dict):
        raise APIError(400, f"the body is {_kind(value)}; send a JSON object")
    return value


def _check_type(request: Request) -> None:
    """Checks that the body is declared as JSON.

    A page of another origin cannot declare JSON without a CORS preflight request (Fetch standard,
    "CORS-safelisted request-header"), so it cannot make a browser send requests to this server.
    """
    message = Message()
    given = message["content-type"] = request.headers.get("content-type", "")
    charset = message.get_content_charset("utf-8")
    subtype = message.get_content_subtype()
    declared = message.get_content_maintype() == "application" and (
        subtype == "json" or subtype.endswith("+json")
    )
    if not declared or charset not in ("utf-8", "utf8"):
        raise APIError(
            415, f"the content type is {given!r}; send JSON with Content-Type: application/json"
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise APIError(415, f"Content-Encoding {encoding!r} is not supported; send plain JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Returns an object; rejects duplicate keys, which `dict` would silently drop."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = set[str]()
        for key, _ in pairs:
            if key in seen:
                raise APIError(400, f"the body contains the key {key!r} twice; send it once")
            seen.add(key)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise APIError(400, f"the body is not valid JSON: {name} is not a JSON number")


def _integer(digits: str) -> int:
    _check_length(digits)
    return int(digits)


def _number(digits: str) -> float:
    _check_length(digits)
    value = float(digits)
    if not math.isfinite(value):
        raise APIError(400, f"the number {digits[:40]} in the body is too large")
    return value


def _check_length(digits: str) -> None:
    """Limits the digits of a number, because parsing an integer takes quadratic time."""
    if len(digits) > MAX_NUMBER_CHARS:
        raise APIError(
            400,
            f"the body contains a number of {len(digits)} characters; the maximum is "
            f"{MAX_NUMBER_CHARS}",
        )


def _kind(value: object) -> str:
    """Returns the JSON name of a value that is not an object."""
    if value is None:
        return "null"
    names = {list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
