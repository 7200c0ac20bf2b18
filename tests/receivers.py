"""A receiver of webhooks on loopback, whose answers a test chooses."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from millstream.client.webhooks import Outcome, verify

SECRET = "a secret of many letters"


@dataclass
class Receiver:
    """Answers with `statuses`, one by one, then 200. While `hangs`, requests to /hang get no answer."""

    port: int = 0
    statuses: list[int] = field(default_factory=list)
    requests: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)
    hangs: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str = "hook") -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    @property
    def outcomes(self) -> list[Outcome]:
        """All outcomes that came, each verified."""
        return [verify(headers, body, SECRET) for _, headers, body in list(self.requests)]

    def ids(self) -> list[str]:
        return [headers["X-Millstream-Id"] for _, headers, _ in list(self.requests)]


@contextmanager
def receiving(receiver: Receiver) -> Iterator[Receiver]:
    """Listens at the receiver's port, or at any if it is 0. Reused, so that a receiver can come back."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.requests.append((self.path, dict(self.headers), body))
            if receiver.hangs.is_set() and self.path.startswith("/hang"):
                receiver.over.wait(30)
                return
            status = receiver.statuses.pop(0) if receiver.statuses else 200
            with suppress(OSError):
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", receiver.url("elsewhere"))
                self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", receiver.port), Handler)
    server.daemon_threads = True
    receiver.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield receiver
    finally:
        receiver.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
