"""A small OpenAI-compatible server on a real socket. As a program it is a stand-in for `maxlike serve`.

It answers by the prompt's number n, counted from 0, as its behaviour says: `steady`: at once; `busy`: every third
request is turned away; `drops`: every third connection is closed in the middle; `together`: once 24 requests are there.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behaviour: str = "steady"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.all_there = threading.Barrier(24)
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": "fake-model", "object": "model"}]})
        elif self.path == "/ready":
            self._json(200, {})
        else:
            self._json(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            n = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.paths.append(self.path)
        if self.server.behaviour == "busy" and n % 3 == 1:
            self._json(429, {"error": {"message": "the queue is full", "type": "rate_limit"}})
            return
        if self.server.behaviour == "together":
            self.server.all_there.wait(30)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        total = body["max_tokens"]
        for i in range(total):
            if self.server.behaviour == "drops" and n % 3 == 1 and i == 1:
                self.close_connection = True
                return
            reason = "length" if i == total - 1 else None
            self._event({"choices": [{"index": 0, "text": "é", "delta": {"content": "é"}, "finish_reason": reason}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": total}})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, value: Any) -> None:
        self._chunk(f"data: {json.dumps(value)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _json(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running(behaviour: str = "steady") -> Iterator[FakeServer]:
    with FakeServer(behaviour) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def main(behaviour: str, marker: str) -> None:
    """Prints more than a pipe holds; `marker` is a file that tells how it ended."""
    if behaviour == "fails":
        print("there is no such model", file=sys.stderr)
        raise SystemExit(3)
    if behaviour == "silent":
        time.sleep(60)
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"serving fake-model on {server.url} (Ctrl-C ends it)", flush=True)
        print("x" * 200_000, flush=True)

        def end(number: int, frame: object) -> None:
            with open(marker, "w") as file:
                file.write("ended in order")
            raise SystemExit(0)

        signal.signal(signal.SIGTERM, end)
        time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
