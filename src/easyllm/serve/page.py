"""The chat page: static files of the package, compressed once and served from memory."""

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException as RoutingError
from starlette.requests import Request
from starlette.responses import Response

from easyllm.serve.endpoint import Endpoint
from easyllm.serve.guard import PUBLIC_PREFIX

WEB = Path(__file__).parent / "web"
PAGE = "index.html"
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)
"""Content-Security-Policy of the page: no inline script or style, nothing from elsewhere."""
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFile:
    """A file of the page.

    Attributes:
        media_type: its type.
        body: its bytes.
        compressed: the same, compressed by gzip.
        tag: its entity tag (RFC 9110, 8.8.3).
    """

    media_type: str
    body: bytes
    compressed: bytes
    tag: str


@cache
def static_files() -> Mapping[str, StaticFile]:
    """Returns the page's files by their path below the folder of the page.

    Only these can be requested: no path of a request is looked up on disk.
    """
    return {
        path.relative_to(WEB).as_posix(): _read(path)
        for path in sorted(WEB.rglob("*"))
        if path.suffix in _TYPES
    }


def page_endpoints() -> list[Endpoint]:
    """Returns the routes of the page and of its files."""

    async def page(http: Request) -> Response:
        return _answer(http, PAGE)

    async def asset(http: Request, name: str) -> Response:
        return _answer(http, name)

    return [
        Endpoint(method="GET", path="/", answer=page, documented=None),
        Endpoint(method="GET", path=PUBLIC_PREFIX + "{name:path}", answer=asset, documented=None),
    ]


def _read(path: Path) -> StaticFile:
    body = path.read_bytes()
    return StaticFile(
        media_type=_TYPES[path.suffix],
        body=body,
        compressed=gzip.compress(body, mtime=0),
        tag=f'"{hashlib.sha256(body).hexdigest()[:32]}"',
    )


def _answer(http: Request, name: str) -> Response:
    """Returns a file; 304 if the client has it already.

    Raises:
        RoutingError: the page has no such file.
    """
    found = static_files().get(name)
    if found is None:
        raise RoutingError(404)
    # no-cache: a browser asks each time, and gets 304 until the package is updated
    headers = {"ETag": found.tag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    headers["Content-Security-Policy"] = POLICY
    if found.tag in http.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    body = found.body
    if "gzip" in http.headers.get("accept-encoding", ""):
        body, headers["Content-Encoding"] = found.compressed, "gzip"
    return Response(body, media_type=found.media_type, headers=headers)


__all__ = ["POLICY", "StaticFile", "page_endpoints", "static_files"]
