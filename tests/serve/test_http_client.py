"""The client of the load test: addresses, responses in any pieces, and connections."""

import asyncio
import time

import pytest

from easyllm.core.errors import ConfigError
from easyllm.serve.http_client import Address, HTTPClient
from easyllm.serve.http_response import HTTPFailure, ResponseParser


@pytest.mark.parametrize(
    ("url", "host", "port", "secure", "prefix"),
    [
        ("http://127.0.0.1:8420", "127.0.0.1", 8420, False, ""),
        ("localhost:8420/v1/", "localhost", 8420, False, "/v1"),
        ("https://llm.example/api", "llm.example", 443, True, "/api"),
        ("http://[::1]:80", "::1", 80, False, ""),
    ],
)
def test_an_address_is_read_from_a_url(url, host, port, secure, prefix):
    assert Address.parse(url) == Address(host, port, secure, prefix)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://x",
        "http://",
        "http://x:99999",
        "http://x:y",
        "http://a b",
        "http://模",
        "http://[",
    ],
)
def test_other_urls_are_refused_with_an_example(url):
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:8420"):
        Address.parse(url)


@pytest.mark.parametrize("url", ["http://user:key@x", "http://x/?a=1", "http://x/#a"])
def test_parts_that_would_be_ignored_are_refused(url):
    with pytest.raises(ConfigError, match="leave it out"):
        Address.parse(url)


RESPONSES = {
    "sized": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
    "chunked": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
        b"3\r\nhel\r\n2;name=value\r\nlo\r\n0\r\nX-Trailer: 1\r\n\r\n",
        b"hello",
    ),
    "empty chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", b""),
    "no body": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "zero": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
    "interim first": (
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"hello",
    ),
    "line breaks in a chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n\r\n\r\n\r\n0\r\n\r\n",
        b"\r\n\r\n",
    ),
}


def parse(data, step):
    parts = []
    parser = ResponseParser(lambda part, now_s: parts.append(part))
    for place in range(0, len(data), step):
        parser.feed(data[place : place + step], 0.0)
    return parser, b"".join(parts)


@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_is_the_same_in_any_pieces(name):
    data, body = RESPONSES[name]
    for step in range(1, len(data) + 1):
        parser, found = parse(data, step)
        assert (parser.complete, parser.reusable, found) == (True, True, body)
        assert parser.status in (200, 204)


def test_a_body_without_a_length_ends_with_the_connection():
    parser, found = parse(b"HTTP/1.1 200 OK\r\n\r\nhello", 3)
    assert (parser.complete, found) == (False, b"hello")
    parser.end()
    assert (parser.complete, parser.reusable) == (True, False)


@pytest.mark.parametrize(
    "head", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: Close\r\n"]
)
def test_a_connection_that_the_server_closes_is_not_reused(head):
    parser, _ = parse(head + b"Content-Length: 0\r\n\r\n", 7)
    assert not parser.reusable


@pytest.mark.parametrize("data", [data[:-1] for data, _ in RESPONSES.values() if len(data) > 30])
def test_a_connection_that_ends_early_is_a_failure(data):
    parser, _ = parse(data, 5)
    with pytest.raises(HTTPFailure, match="closed early"):
        parser.end()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 5000,
        b"x" * 100_000,
    ],
)
def test_what_is_not_http_is_a_failure(data):
    with pytest.raises(HTTPFailure, match="invalid HTTP"):
        parse(data, 1000)


class Server:
    """Answers each request on a connection with the next of some byte strings.

    None closes the connection without an answer; a number is waited for, in seconds.
    """

    def __init__(self, *answers):
        self.answers, self.connections, self.requests = list(answers), 0, []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        port = self.server.sockets[0].getsockname()[1]
        self.client = HTTPClient(Address("127.0.0.1", port, False, "/root"), timeout_s=0.5)
        return self

    async def __aexit__(self, *_):
        self.client.close()
        self.server.close()

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
                self.requests.append((head, await reader.readexactly(int(size or 0))))
                answer = self.answers.pop(0) if self.answers else None
                if answer is None:
                    break
                if isinstance(answer, float):
                    await asyncio.sleep(answer)
                    break
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def sized(body, extra=b""):
    return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (extra, len(body), body)


def test_requests_share_a_connection():
    async def run():
        async with Server(sized(b"one"), sized(b"two")) as server:
            first = await server.client.request("GET", "/a")
            second = await server.client.request("POST", "/b", b"body")
            return first, second, server

    first, second, server = asyncio.run(run())
    assert (first, second) == ((200, b"one"), (200, b"two"))
    assert server.connections == 1
    (head, _), (other, body) = server.requests
    assert head.startswith(b"GET /root/a HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"Content-Type: application/json" in other
    assert body == b"body"


def test_concurrent_requests_have_connections_of_their_own():
    async def run():
        async with Server(*[sized(b"x")] * 4) as server:
            await asyncio.gather(*(server.client.request("GET", "/") for _ in range(4)))
            return server.connections

    assert asyncio.run(run()) == 4


def test_a_request_on_a_closed_idle_connection_is_sent_again():
    async def run():
        async with Server(sized(b"one"), None, sized(b"two")) as server:
            await server.client.request("GET", "/")
            answer = await server.client.request("GET", "/")
            return answer, server.client.num_repeated

    assert asyncio.run(run()) == ((200, b"two"), 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "closed early"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "no complete response within 0.5 s"),
        (5.0, "no complete response within 0.5 s"),
        (b"junk\r\n\r\n", "invalid HTTP"),
    ],
)
def test_a_failed_request_says_what_kind(answer, message):
    async def run():
        async with Server(answer) as server:
            with pytest.raises(HTTPFailure, match=message):
                await server.client.request("GET", "/")
            assert not server.client._idle

    begin = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - begin < 4


def test_nobody_listening_is_a_failure_to_connect():
    async def run():
        async with Server() as server:
            pass
        with pytest.raises(HTTPFailure, match="cannot connect: Connection refused"):
            await server.client.request("GET", "/")

    asyncio.run(run())


def test_an_unknown_host_is_a_failure_to_connect():
    async def run():
        client = HTTPClient(Address("no.such.host.invalid", 80, False, ""))
        with pytest.raises(HTTPFailure, match="cannot connect: the host name is not known"):
            await client.request("GET", "/")

    asyncio.run(run())
