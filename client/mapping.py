"""Mapping: iterables of any length, sent through a bounded window of calls. A blocking driver, and one for asyncio."""

from __future__ import annotations

import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from itertools import islice
from typing import Any

from millstream.broker.contract.job import Json
from millstream.client import awaiting
from millstream.client.handle import Handle
from millstream.client.map_window import MapWindow

LOOK_S = 0.5
"""Seconds between two checks whether a call's deadline is over."""


def map_rows(
    start: Callable[[Sequence[Json]], Handle], inputs: Iterable[Json], window: MapWindow[Handle]
) -> Generator[Any, None, None]:
    """Does as Client.map. `start` sends a list of rows as a call."""
    chunks = _read_chunks(inputs, window.rows_per_call)
    try:
        while True:
            while window.has_room and (rows := next(chunks, None)):
                window.add(start(rows), len(rows))
            if not window.awaited:
                return
            yield from window.give_out(_wait_for_one(window.awaited))
    finally:
        for handle in window.drop():
            handle.cancel_soon()


async def map_rows_async(
    start: Callable[[Sequence[Json]], Awaitable[Handle]],
    inputs: Iterable[Json] | AsyncIterable[Json],
    window: MapWindow[Handle],
) -> AsyncGenerator[Any, None]:
    """Does as AsyncClient.map. `start` sends a list of rows as a call."""
    chunks = _read_chunks_async(inputs, window.rows_per_call)
    try:
        while True:
            while window.has_room and (rows := await anext(chunks, None)):
                window.add(await start(rows), len(rows))
            if not window.awaited:
                return
            for result in window.give_out(await awaiting.wait_for_one(window.awaited) or 0):
                yield result
    finally:
        for handle in window.drop():
            handle.cancel_soon()


def _wait_for_one(handles: Sequence[Handle]) -> int:
    """Waits for a complete call and returns its index in `handles`."""
    if len(handles) == 1:
        handles[0].wait()
        return 0
    changed = threading.Event()
    try:
        for handle in handles:
            handle.listen(changed.set)
        while True:
            changed.clear()
            # Listeners are not called at a call's deadline: `wait(0)` checks it.
            for place, handle in enumerate(handles):
                if handle.wait(0):
                    return place
            changed.wait(LOOK_S)
    finally:
        for handle in handles:
            handle.unlisten(changed.set)


def _read_chunks(inputs: Iterable[Json], size: int) -> Iterator[list[Json]]:
    source = iter(inputs)
    while rows := list(islice(source, size)):
        yield rows


async def _read_chunks_async(inputs: Iterable[Json] | AsyncIterable[Json], size: int) -> AsyncIterator[list[Json]]:
    chunk: list[Json] = []
    async for row in _read_rows(inputs):
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def _read_rows(inputs: Iterable[Json] | AsyncIterable[Json]) -> AsyncIterator[Json]:
    if isinstance(inputs, AsyncIterable):
        async for row in inputs:
            yield row
    else:
        for row in inputs:
            yield row
