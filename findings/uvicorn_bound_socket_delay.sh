#!/usr/bin/env bash
# uvicorn: with a socket that it has bound itself for several workers, a response on an open connection takes 40 ms longer.
#
# asyncio turns Nagle's algorithm off (TCP_NODELAY) only for sockets whose protocol number is that of TCP. `Config.bind_socket`,
# which uvicorn calls for --workers and --reload, makes a socket with protocol 0, and so do most programs that hand a listening
# socket to `Server.run(sockets=[...])`. h11 responses are written in two parts, head and body; the second waits until the client
# acknowledges the first, and clients delay that by 40 ms on Linux. A single worker binds through asyncio and is not affected.
#
# Seen on 30 November 2026 with uvicorn 0.54.0, h11 0.16.0, Python 3.11 on Linux:
#   a GET on an open connection: about 1 ms from asyncio's socket, about 44 ms from bind_socket's
#
# What to do: create the socket with socket.IPPROTO_TCP, or set TCP_NODELAY on it before listening (accepted connections inherit
# it). This project's server does so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet uvicorn==0.54.0 h11==0.16.0
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
cd "$work"
"$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || { status=$?; tail -3 "$work/log"; exit $status; }
import http.client
import statistics
import sys
import threading
import time

import uvicorn


async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


def median_ms(own_socket):
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http="h11", lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()] if own_socket else None
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    connection, seconds = http.client.HTTPConnection("127.0.0.1", port), []
    for _ in range(30):
        begun = time.perf_counter()
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"ok"
        seconds.append(time.perf_counter() - begun)
    server.should_exit = True
    thread.join()
    return 1000 * statistics.median(seconds[10:])


plain, bound = median_ms(False), median_ms(True)
print(
    f"uvicorn 0.54.0: a GET on an open connection: {plain:.1f} ms from asyncio's socket, "
    f"{bound:.1f} ms from bind_socket's"
)
sys.exit(not (bound > 20 and bound > 5 * plain))
PYTHON
