"""A server that runs in a thread of the test, and a question for it."""

import socket
import threading
import time
from contextlib import contextmanager

from easyllm.serve.run import bind, build_server

QUESTION = [{"role": "user", "content": "hello"}]


@contextmanager
def running(models, *, send_buffer=None, **options):
    """Runs a server on a free loopback port and yields its address.

    `send_buffer` is the size of the kernel's send buffer for each client, in bytes.
    """
    listener = bind("127.0.0.1", 0)
    if send_buffer is not None:  # accepted connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = build_server(models, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
