"""A server with the endpoints that the chat page uses, whose every word comes from the test."""

from __future__ import annotations

import json
import queue
import select
import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "maxlike" / "serve" / "chat.html"
POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
PATIENCE = 60  # seconds
_END, _BREAK = object(), object()


class Exchange:
    """A request for a completion, which the test answers."""

    def __init__(self, path: str, headers: Mapping[str, str], body: Any):
        self.path, self.headers, self.body = path, headers, body
        self.hung_up = threading.Event()
        self.actions: queue.Queue[Any] = queue.Queue()

    def refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Answers with an error as OpenAI words it."""
        self.actions.put((status, {"error": {"message": message, "type": "error", "param": None, "code": None}},
                          headers or {}))

    def raw(self, data: bytes) -> None:
        """Sends a chunk of the stream as it is."""
        self.actions.put(data)

    def event(self, value: Any) -> None:
        """Sends an event."""
        self.raw(f"data: {json.dumps(value)}\n\n".encode())

    def say(self, text: str, finish_reason: str | None = None) -> None:
        """Sends a piece of the answer."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        if self.path == "/v1/completions":
            choice["text"] = text
        else:
            choice["delta"] = {"content": text} if text else {}
        self.event({"choices": [choice], "usage": None})

    def finish(self, reason: str = "stop", prompt: int = 7, completion: int = 2, cached: int = 0) -> None:
        """Ends the answer: the reason, the usage, [DONE]."""
        self.say("", reason)
        self.event({"choices": [], "usage": {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached}}})
        self.raw(b"data: [DONE]\n\n")
        self.end()

    def end(self) -> None:
        """Ends the response as HTTP has it."""
        self.actions.put(_END)

    def break_off(self) -> None:
        """Closes the connection in the midst of the response."""
        self.actions.put(_BREAK)


class ScriptedServer(ThreadingHTTPServer):
    """Serves the page, a list of models, and completions as `Exchange`s, which `next()` gives.

    `key` is the API key wanted, if one is; `unready` is the `Retry-After` of a 503 in place of the models; `asked` are
    the requests that came, as method and path.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: list[dict[str, Any]] = [
            {"id": "tiny", "object": "model", "maxlike": {"has_chat_template": True, "max_model_len": 4096}}]
        self.key: str | None = None
        self.unready: str | None = None
        self.asked: list[str] = []
        self.exchanges: queue.Queue[Exchange] = queue.Queue()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def next(self) -> Exchange:
        """The next request for a completion."""
        return self.exchanges.get(timeout=PATIENCE)


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data)),
                             "Connection": "close"} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _has_key(self) -> bool:
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self._answer(401, {"error": {"message": "Invalid <b>API</b> key.", "code": "invalid_api_key"}})
        return False

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        if self.path == "/":
            self._answer(200, PAGE.read_bytes(), {"Content-Type": "text/html; charset=utf-8",
                                                  "Content-Security-Policy": POLICY})
        elif self.path != "/v1/models":
            self._answer(404, {"error": {"message": f"no {self.path}"}})
        elif self._has_key():
            if self.server.unready is not None:
                self._answer(503, {"error": {"message": "Loading."}}, {"Retry-After": self.server.unready})
            else:
                self._answer(200, {"object": "list", "data": self.server.models})

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._has_key():
            return
        exchange = Exchange(self.path, dict(self.headers), body)
        self.server.exchanges.put(exchange)
        started = False
        while not exchange.hung_up.is_set():
            try:
                action = exchange.actions.get(timeout=0.02)
            except queue.Empty:
                if self._is_gone():
                    exchange.hung_up.set()
                continue
            if isinstance(action, tuple):
                self._answer(*action)
                return
            if not started:
                self.send_response(200)
                for name, value in (("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked"),
                                    ("Connection", "close")):
                    self.send_header(name, value)
                self.end_headers()
                started = True
            if action is _BREAK:
                self.close_connection = True
                return
            try:
                self.wfile.write(b"0\r\n\r\n" if action is _END else b"%x\r\n%s\r\n" % (len(action), action))
            except OSError:
                exchange.hung_up.set()
            if action is _END:
                return

    def _is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return False
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True
