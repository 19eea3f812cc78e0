"""A server of chat completions on loopback that answers as it is told."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """What the server was sent, and when."""

    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    time: float


@dataclass(frozen=True)
class Reply:
    """What it answers. ``drip`` is the part, headers or body, that comes a byte in a tenth of a second."""

    status: int = 200
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    drip: str = ""


def completion(content: Any, finish: Any = "stop") -> Reply:
    choice = {"finish_reason": finish, "message": {"content": content}}
    return Reply(content=json.dumps({"choices": [choice]}).encode())


@contextmanager
def chat_server(answer: Callable[[dict[str, Any], int], Reply | None]) -> Iterator[tuple[str, list[Request]]]:
    """``answer(request, number from 1)`` returns None to hang up; yields the base URL and the requests."""
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(Request(body, dict(self.headers), self.path, time.monotonic()))
            reply = answer(body, len(requests))
            if reply is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if reply.drip == "headers":
                self.drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000)
                return
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.content)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            (self.drip if reply.drip else self.wfile.write)(reply.content)

        def drip(self, content: bytes) -> None:
            try:
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
            except OSError:  # the other side has had enough
                pass

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", requests
    finally:
        http.shutdown()
        http.server_close()
