"""What runs beside the browser: callers of a service, and the dashboard's server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from contracts.queue import Queue

from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.gateway.dashboard.server import Server
from millstream.gateway.dashboard.settings import make_settings
from millstream.gateway.web_server import listen


@dataclass
class Mill:
    """A server, the dashboard's URL, and the queue of the service whose jobs nobody takes."""

    server: EmbeddedServer
    url: str
    thumbnails: Queue


@contextmanager
def calling(url: str) -> Iterator[None]:
    """A caller of `embed`, who sends the next texts when the last ones are answered."""
    ended = threading.Event()

    def call() -> None:
        with Client(url) as client:
            while not ended.is_set():
                for handle in [client.submit("embed", ["a text"] * rows) for rows in (1, 2, 3, 4, 5)]:
                    handle.result(timeout=60)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        yield
    finally:
        ended.set()
        caller.join()


@contextmanager
def serving(connection: Connection) -> Iterator[str]:
    """A dashboard; the URL of its first page."""
    with listen("127.0.0.1", 0) as listening:
        server = Server(connection, "ms", make_settings("127.0.0.1", has_users=False), None)
        thread = threading.Thread(target=server.serve_on, args=(listening,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.stop()
            thread.join()
