"""HTTP servers of tests: a handler that answers for a fake, run in threads."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JsonHandler(BaseHTTPRequestHandler):
    """Sends JSON objects and logs nothing; `threaded` sets `fake`."""

    fake = None

    def log_message(self, *_):
        pass

    def send_object(self, status, value, headers=()):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers:
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def threaded(handler, fake):
    """Runs a server whose `handler` answers for `fake`, and yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Fake", (handler,), {"fake": fake}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
