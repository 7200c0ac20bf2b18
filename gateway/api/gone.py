"""Work for a caller that may leave: it ends when the caller's connection does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class CallerGone(Exception):
    """The caller has closed its connection, and nobody reads an answer."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`. Cancels it, and raises CallerGone, when the caller closes its connection.

    The request's body was read before: the next message that `receive` returns is the end of the connection.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            # The request ends after what the work does when it is cancelled.
            await asyncio.wait({working})
            if working.cancelled() or working.exception() is not None:
                raise CallerGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
