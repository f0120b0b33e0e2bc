"""The JSON that the server writes: responses, and the data of events."""

import json

from starlette.responses import JSONResponse as StarletteResponse

from easyllm.core.json_types import Json


def json_text(value: Json) -> str:
    r"""Returns a value as JSON text that UTF-8 can encode.

    A request may contain half of a character as an escape (a lone surrogate, where a text was cut),
    and a response may repeat it; it is written as the same escape.

    >>> print(json_text({"cut": "é\ud83d"}))
    {"cut":"é\ud83d"}
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # within the strings of JSON, Python's escape of a surrogate is JSON's
    return text.encode("utf-8", "backslashreplace").decode()


class JSONResponse(StarletteResponse):
    """A response whose body is a JSON value, written by `json_text`."""

    def render(self, content: Json) -> bytes:
        """Returns the body."""
        return json_text(content).encode()
