"""Handle of a submitted call, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

from millstream.broker.contract.errors import DeadlineExceeded
from millstream.broker.contract.job import Json
from millstream.client.awaiting import wait_for_one
from millstream.client.channel.loop_calls import Changed, listener
from millstream.client.handle import CANCEL_S, Handle
from millstream.client.job_terms import waits_until
from millstream.client.result import Embeddings
from millstream.client.row_results import RowOutcome


class AsyncHandle:
    """Handle of a submitted call, awaitable: `await handle` is `await handle.result()`."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    @property
    def id(self) -> str:
        """Does as Handle.id."""
        return self._handle.id

    @property
    def version(self) -> str:
        """Does as Handle.version."""
        return self._handle.version

    @property
    def rows_done(self) -> int:
        """Number of rows that have their outcome, for a progress bar."""
        return self._handle.rows_done

    def __await__(self) -> Generator[Any, None, Embeddings | list[Json]]:
        return self.result().__await__()

    async def result(self, timeout: float | None = None) -> Embeddings | list[Json]:
        """Does as Handle.result. Cancelling the awaiting task cancels the call."""
        await self._wait(timeout)
        return self._handle.result(0)

    async def outcomes(self, timeout: float | None = None) -> list[RowOutcome]:
        """Does as Handle.outcomes. Cancelling the awaiting task cancels the call."""
        await self._wait(timeout)
        return self._handle.outcomes(0)

    async def cancel(self) -> bool:
        """Does as Handle.cancel."""
        reported = Changed()
        cancelling = self._handle.begin_cancel(listener(reported.set))
        await reported.wait(CANCEL_S if cancelling.asked else 0.0)
        return cancelling.result()

    def cancel_soon(self) -> None:
        """Does as Handle.cancel_soon."""
        self._handle.cancel_soon()

    async def _wait(self, timeout: float | None) -> None:
        until = waits_until(timeout)
        try:
            if await wait_for_one([self._handle], until) is None:
                raise DeadlineExceeded(f"no result within {timeout} s of waiting", phase="total")
        except asyncio.CancelledError:
            self._handle.cancel_soon()
            raise
