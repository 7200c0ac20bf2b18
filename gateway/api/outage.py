"""Calls that wait while the queue's server is away: a bounded number, and one task that asks whether it is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError
from millstream.broker.transport.error_map import is_transient
from millstream.gateway.api.errors import Refusal

T = TypeVar("T")

HOLD_S = 30.0
"""Seconds that a call without a deadline waits for the server at most."""

ASK_S = 0.25
"""Seconds between two questions whether the server is back."""


class Places:
    """A bounded number of places. `code` and `message` are those of the refusal if all are in use."""

    def __init__(self, most: int, code: str, message: str) -> None:
        self.used = 0
        self._most, self._code, self._message = most, code, message

    @contextmanager
    def take(self) -> Iterator[None]:
        """Holds a place in its block. Raises Refusal, status 503, if there is none."""
        if self.used >= self._most:
            raise Refusal(503, self._code, self._message, retry_after=1.0)
        self.used += 1
        try:
            yield
        finally:
            self.used -= 1


class Outage:
    """Repeats calls that fail because the server is away. For one event loop.

    `ping` raises BrokerUnavailable while it is. At most `most` calls wait.
    """

    def __init__(self, ping: Callable[[], Awaitable[object]], most: int) -> None:
        self._ping = ping
        self._asking: asyncio.Task[None] | None = None
        self._places = Places(
            most, "broker_unavailable", "the queue's server cannot be reached, and many requests wait for it already"
        )

    @property
    def waiting(self) -> int:
        """Number of calls that wait."""
        return self._places.used

    async def outlast(self, attempt: Callable[[float | None], Awaitable[T]], timeout: float | None) -> T:
        """Returns what `attempt` does. Repeats it once the server is back, until `timeout` seconds from now are over.

        `attempt` gets the seconds that are left, None if there is no limit. Raises Refusal if too many calls wait.
        """
        began = time.monotonic()
        until = began + (HOLD_S if timeout is None else timeout)
        remaining = timeout
        while True:
            try:
                return await attempt(remaining)
            except BrokerUnavailable as error:
                if not is_transient(error) or time.monotonic() >= until:
                    raise
                with self._places.take():
                    await self._wait(until)
                remaining = None if timeout is None else until - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise

    async def _wait(self, until: float) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        await asyncio.wait({self._asking}, timeout=max(0.0, until - time.monotonic()))

    async def _ask(self) -> None:
        while True:
            await asyncio.sleep(ASK_S)
            try:
                await self._ping()
            except MillstreamError:
                continue
            return
