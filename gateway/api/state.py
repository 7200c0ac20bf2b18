"""State that all routes of one process share, and what a route may ask of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from starlette.requests import Request

from millstream.broker.queue.routes import Routes
from millstream.broker.transport.connection import translated
from millstream.client.async_calls import AsyncCalls
from millstream.client.calls import Calls
from millstream.gateway.api.keys import Key
from millstream.gateway.api.outage import Outage
from millstream.gateway.api.settings import Settings
from millstream.telemetry.readings import reader

T = TypeVar("T")

FRESH_S = 1.0
"""Seconds for which one look at the server serves all requests."""

PING_S = 1.0
"""Seconds without a byte after which the server counts as away."""


class Shared(Generic[T]):
    """Value that is read at most once in FRESH_S, in a thread, for all requests together."""

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._reading: asyncio.Task[T] | None = None
        self._read_at = 0.0

    async def get(self) -> T:
        """Returns the value. Raises as `read` does."""
        if self._reading is None or (self._reading.done() and time.monotonic() - self._read_at > FRESH_S):
            self._reading = asyncio.create_task(asyncio.to_thread(self._read))
            self._read_at = time.monotonic()
        # Shielded: a request that ends must not take the answer from the others.
        return await asyncio.shield(self._reading)


class Gateway:
    """The clients of one process, for one event loop.

    `read` reads all services, in the caller's thread; `readings` is the last such look, for all requests.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._write_page: Callable[[], bytes] | None = None
        self._calls = Calls(settings.url, settings.prefix)
        self.calls = AsyncCalls(self._calls)
        self.outage = Outage(lambda: self.calls.in_thread(self._ping), settings.max_pending)
        self.read = reader(self._calls.connection, settings.prefix)
        self.readings = Shared(self.read)
        self.models = Shared(self._list_models)

    def write_metrics(self) -> tuple[bytes, str]:
        """Returns a page of metrics and its content type. Blocks. Raises ImportError without the extra `metrics`."""
        from millstream.telemetry.exporter import PAGE_TYPE, page_writer

        with self._lock:
            self._write_page = self._write_page or page_writer(self.read)
        return self._write_page(), PAGE_TYPE

    async def close(self) -> None:
        """Ends threads and connections. Calls under way get BrokerUnavailable."""
        await asyncio.to_thread(self._calls.close)

    def _ping(self) -> None:
        with translated(self._calls.connection.safe_url):
            self._calls.connection.within(PING_S).ping()

    def _list_models(self) -> list[str]:
        connection, registry = self._calls.connection, self._calls.registry
        return sorted({*registry.names(), *Routes(connection, registry.prefix).names()})


def gateway_of(request: Request) -> Gateway:
    """Returns the state of the process that serves a request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def key_of(request: Request) -> Key:
    """Returns the API key of a request."""
    key: Key = request.state.key
    return key
