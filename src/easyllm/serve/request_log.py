"""The request log: one line for each HTTP request, for people or as JSON.

    2026-11-30T08:00:00.123Z POST /v1/chat/completions 200 model=smollm2 prompt_tokens=128 …

A line contains what was used and how long it took, never contents, headers or keys. Characters
that are not printable are escaped, so that no client can forge a line or control a terminal.
"""

import json
import logging
import sys
from datetime import UTC, datetime

from easyllm.core.json_types import JsonObject
from easyllm.serve.trace import RequestTrace

logger = logging.getLogger("easyllm.requests")
MAX_SHOWN_CHARS = 200


class RequestLog:
    """Writes a line to the logger `easyllm.requests` for each request.

    Args:
        json_lines: whether the lines are JSON objects.
    """

    def __init__(self, *, json_lines: bool = False) -> None:
        self._format = json_line if json_lines else text_line

    def write(self, trace: RequestTrace) -> None:
        """Writes the line of a request that has ended."""
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", self._format(trace))


def log_to_stderr() -> None:
    """Lets the request log write to standard error, each line as it is; for the command line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def json_line(trace: RequestTrace) -> str:
    """Returns a request as a JSON object in one line; unknown values are null."""
    return _printable(json.dumps(_fields(trace), ensure_ascii=False))


def text_line(trace: RequestTrace) -> str:
    """Returns a request as words and `name=value` pairs; zeros and unknown values are left out."""
    fields = _fields(trace)
    words = [str(fields.pop(name)) for name in ("time", "method", "path", "status")]
    fields.pop("route")
    for name, value in fields.items():
        if value is True:
            words.append(name)
        elif isinstance(value, float):
            words.append(f"{name}={value:.3f}")
        elif value:
            words.append(f"{name}={_quoted(str(value))}")
    return _printable(" ".join(words))


def _fields(trace: RequestTrace) -> JsonObject:
    """Returns the values of a line by name."""
    first = trace.first_token_after_s
    return {
        "time": _timestamp(trace.arrived_unix_s),
        "method": _shortened(trace.method),
        "path": _shortened(trace.path),
        "route": trace.route,
        "status": trace.status or (499 if trace.client_gone else 500),
        "model": _shortened(trace.model),
        "prompt_tokens": trace.prompt_tokens,
        "cached_tokens": trace.cached_tokens,
        "completion_tokens": trace.completion_tokens,
        "first_token_s": None if first is None else round(first, 4),
        "total_s": round(trace.total_s, 4),
        "finish_reason": ",".join(trace.finish_reasons) or None,
        "client_gone": trace.client_gone,
    }


def _timestamp(unix_s: float) -> str:
    text = datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds")
    return text.removesuffix("+00:00") + "Z"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…"


def _quoted(text: str) -> str:
    """Returns a value, in JSON's quotes if a reader could take it for several words."""
    plain = not any(character in text for character in ' "=\\')
    return text if plain else json.dumps(text, ensure_ascii=False)


def _printable(line: str) -> str:
    """Escapes control characters, other separators than the space, and lone surrogates as JSON."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
