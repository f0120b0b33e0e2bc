"""Requests to an address with OpenAI's chat completions API, with retries and timeouts.

Uses the standard library only. Redirects are not followed, so that an API key is sent to no other
address than the given one.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message as Headers
from typing import IO
from urllib.parse import urlsplit

from easyllm.core.errors import ConfigError, EasyllmError
from easyllm.core.json_types import Json, JsonObject

MAX_BODY_BYTES = 4 * 2**20
RETRIED = {408, 409, 425, 429}
"""Statuses below 500 after which a request is sent again."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0


class JudgeError(EasyllmError):
    """A judge cannot be reached, or refuses a request."""


class Refused(JudgeError):
    """The address refused a request with a status that does not change by itself.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Headers,
        newurl: str,
    ) -> None:
        """Returns None, which makes a redirect an error."""


class JudgeClient:
    """Sends JSON requests to one address; safe to use from several threads.

    Args:
        url: the address, with or without `/v1`.
        key: the API key, sent as a bearer token; None sends none.
        timeout_s: maximum time to connect, and to wait for data.
        retries: number of times a request is sent again.
        sleep: waits between them.

    Raises:
        ConfigError: the URL is not that of an HTTP server.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = base_url(url)
        self._headers = {"Content-Type": "application/json", "User-Agent": "easyllm-judge"}
        if key:
            if not key.isascii() or not key.isprintable():
                raise ConfigError("the judge's API key has characters that HTTP headers cannot")
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout_s, self._retries, self._sleep = timeout_s, retries, sleep
        self._opener = urllib.request.build_opener(_NoRedirects)

    def chat(self, body: JsonObject) -> str:
        """Returns the text of a chat completion.

        Raises:
            Refused: the address refuses the request.
            JudgeError: there is no response, or not that of a chat completion.
        """
        value = self.request("/chat/completions", body)
        try:
            content = value["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise JudgeError(
                f"the response of the judge at {self.url} is not a chat completion; check that the "
                "address has OpenAI's API"
            ) from None
        return content if isinstance(content, str) else ""

    def first_model(self) -> str:
        """Returns the name of the first model that the address lists.

        Raises:
            JudgeError: it lists none.
        """
        value = self.request("/models")
        listed = value.get("data") if isinstance(value, dict) else None
        if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
            raise JudgeError(f"the judge at {self.url} lists no models; set --judge-model")
        return str(listed[0].get("id"))

    def request(self, path: str, body: JsonObject | None = None) -> Json:
        """Returns the JSON value of a response, after retries.

        Raises:
            Refused, JudgeError: as for `chat`.
        """
        wait_s = FIRST_WAIT_S
        for attempt in range(self._retries + 1):
            try:
                return self._once(path, body)
            except (urllib.error.HTTPError, OSError, http.client.HTTPException) as error:
                reason = _reason(error)
                status = error.code if isinstance(error, urllib.error.HTTPError) else None
                if status is not None and status < 500 and status not in RETRIED:
                    raise Refused(
                        f"the judge at {self.url} refused a request with status {status}: {reason}",
                        status,
                    ) from None
                if attempt == self._retries:
                    break
                self._sleep(max(wait_s, _retry_after_s(error)))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise JudgeError(
            f"the judge at {self.url} did not answer in {self._retries + 1} attempts: {reason}; run"
            " the same command again to continue with the verdicts so far"
        )

    def _once(self, path: str, body: JsonObject | None) -> Json:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
        with self._opener.open(request, timeout=self._timeout_s) as response:
            content = response.read(MAX_BODY_BYTES + 1)
        if len(content) > MAX_BODY_BYTES:
            raise JudgeError(f"the response of the judge at {self.url} is larger than 4 MiB")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise JudgeError(
                f"the response of the judge at {self.url} is not JSON; check the address"
            ) from None


def base_url(url: str) -> str:
    """Returns an address as the prefix of OpenAI's paths, ending in `/v1`.

    >>> base_url("127.0.0.1:8420"), base_url("https://host/api/v1/")
    ('http://127.0.0.1:8420/v1', 'https://host/api/v1')

    Raises:
        ConfigError: it is not the URL of an HTTP server, or contains a password.
    """
    full = (url if "://" in url else f"http://{url}").rstrip("/")
    advice = "write it like http://127.0.0.1:8420"
    try:
        parts = urlsplit(full)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"judge {url!r} is not a URL ({error}); {advice}") from None
    known = parts.scheme in ("http", "https") and host
    if not known or not full.isascii() or not full.isprintable() or " " in full:
        raise ConfigError(f"judge {url!r} is not the URL of an HTTP server; {advice}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("the judge's URL has a user, query or fragment; leave it out")
    return full if full.endswith("/v1") else f"{full}/v1"


def _reason(error: Exception) -> str:
    """Returns why a request failed: the server's message, or the system's."""
    if isinstance(error, urllib.error.HTTPError):
        try:
            found = json.loads(error.read(MAX_BODY_BYTES))["error"]["message"]
        except (ValueError, RecursionError, KeyError, TypeError, OSError):
            found = error.reason
        return f"{error.code} {found}" if error.code >= 500 else str(found)
    if isinstance(error, urllib.error.URLError):
        return str(getattr(error.reason, "strerror", None) or error.reason)
    return str(error) or type(error).__name__


def _retry_after_s(error: Exception) -> float:
    """Returns the wait in seconds that a server asks for, at most 60; 0 if it does not."""
    if not isinstance(error, urllib.error.HTTPError):
        return 0.0
    text = error.headers.get("Retry-After") or ""
    return min(float(text), 60.0) if text.isdigit() else 0.0


__all__ = ["JudgeClient", "JudgeError", "Refused", "base_url"]
