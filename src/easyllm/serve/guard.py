"""What stands before the routes: the key, and the size of the body."""

import hmac

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from easyllm.serve.errors import APIError, error_response

MAX_BODY_BYTES = 8 * 2**20
PUBLIC = ("/health", "/")  # the page holds no secret and asks for the key
_TOO_LARGE = f"the request is larger than {MAX_BODY_BYTES} bytes; send less"


class Guard:
    """Checks the key and the announced size before anything is read, and counts the body while it is.

    Args:
        app: what is guarded.
        api_key: asked of every route but the public ones when set.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None = None) -> None:
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, _counted(receive), send)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        """The answer to a request that goes no further."""
        if self.api_key is not None and path not in PUBLIC:
            given, asked = headers.get("authorization", ""), f"Bearer {self.api_key}"
            if not hmac.compare_digest(given.encode(), asked.encode()):
                return error_response(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY"
                )
        if "content-length" in headers and "transfer-encoding" in headers:
            answer = error_response(
                400, "the request has both Content-Length and Transfer-Encoding; send one of them"
            )
            answer.headers["connection"] = "close"  # RFC 9112, 6.1: where it ends is in doubt
            return answer
        size = headers.get("content-length", "0")
        if not (size.isascii() and size.isdigit()) or int(size) > MAX_BODY_BYTES:
            return error_response(413, _TOO_LARGE)
        return None


def _counted(receive: Receive) -> Receive:
    """`receive` that fails once the body is too large, whatever its headers said."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise APIError(413, _TOO_LARGE)
        return message

    return counted
