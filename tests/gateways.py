"""A gateway for tests: its real web server in a thread of the test's process, and requests to it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from support import eventually

from millstream.gateway.addresses import LOCAL_NAMES
from millstream.gateway.api.server import ApiServer
from millstream.gateway.api.settings import Settings
from millstream.gateway.web_server import listen

LONG_S = 60.0


@dataclass
class Running:
    """A gateway that listens on `port` of this host."""

    port: int
    server: ApiServer
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"{self.url}{path}", json=body, headers={**self.headers, **named}, timeout=LONG_S)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers={**self.headers, **headers}, timeout=LONG_S)

    def send(self, path: str, body: object, **headers: str) -> socket.socket:
        """Sends a request and does not read its answer. The caller leaves by closing the socket."""
        content = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(content)}", *(f"{name}: {value}" for name, value in headers.items())]
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=LONG_S)
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + content)
        return connection


@contextmanager
def gateway(url: str, **settings: Any) -> Iterator[Running]:
    """A gateway in front of the queue at `url`, which serves."""
    named = {"prefix": "ms", "hosts": LOCAL_NAMES, "drain_s": 5.0, **settings}
    with listen("127.0.0.1", 0) as listening:
        server = ApiServer(Settings(url, **named))
        thread = threading.Thread(target=server.serve_on, args=(listening,))
        thread.start()
        try:
            eventually(lambda: server.started or not thread.is_alive(), within_s=LONG_S)
            yield Running(listening.getsockname()[1], server)
        finally:
            server.stop()
            thread.join(LONG_S)
            assert not thread.is_alive()


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; "[DONE]" as it is."""
    found = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in found]


def raw(port: int, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Any:
    """The status, headers and body of a request that is sent as it is."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LONG_S)) as connection:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


@contextmanager
def acting(action: Callable[[], object]) -> Iterator[None]:
    """Runs `action` in a thread beside the block, and raises its error behind it."""
    failures: list[BaseException] = []

    def act() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            failures.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join(LONG_S)
    for error in failures:
        raise error
