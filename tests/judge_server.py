"""A local chat endpoint whose replies and faults a test defines."""

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """A reply that is not a chat completion.

    Args:
        status, headers, content: The HTTP response.
        missing: Number of bytes that Content-Length announces but that are not sent before the connection is closed.
        hang: Seconds to wait before the reply.
    """

    status: int = 200
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    missing: int = 0
    hang: float = 0.0


Reply = str | Fault


class JudgeServer(ThreadingHTTPServer):
    """Serve `reply(body, number)`, with requests numbered from 0; refuse connections after `die_after` requests."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply], die_after: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.die_after = reply, die_after
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.replies: Counter = Counter()  # prompt -> complete replies
        self.keys: set[str | None] = set()
        self.stop = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *args: Any) -> None:
        """Ignore clients that close their connection."""

    def die(self) -> None:
        """Refuse connections from now on."""
        self.socket.close()
        threading.Thread(target=self.shutdown, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
            server.keys.add(self.headers.get("Authorization"))
            dead = server.die_after is not None and number >= server.die_after
            if number == server.die_after:
                server.die()
        if dead or not self.path.endswith("/v1/chat/completions"):
            return self.cut()
        reply = server.reply(body, number)
        if isinstance(reply, str):
            with server.lock:
                server.replies[body["messages"][-1]["content"]] += 1
            reply = Fault(content=completion(body, reply))
        server.stop.wait(reply.hang)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.content) + reply.missing))
        self.end_headers()
        self.wfile.write(reply.content)
        if reply.missing:
            self.cut()

    def cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


def completion(body: dict[str, Any], text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"id": "1", "model": f"{body['model']}-0613", "choices": [choice], "usage": {}}).encode()


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply], die_after: int | None = None) -> Iterator[JudgeServer]:
    """Run a server in a thread."""
    server = JudgeServer(reply, die_after)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
