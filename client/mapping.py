"""Iterables of any length through a bounded window of calls."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Literal

from millstream.broker.errors import MillstreamError
from millstream.broker.job import Json
from millstream.client.handle import Handle
from millstream.client.rows import RowOutcome

Results = Literal["values", "outcomes"]
Start = Callable[[Sequence[Json]], Handle]

LOOK_S = 0.5
CHUNKS = 4
"""A window is this many calls: one being collected, the others under way."""


def map_rows(
    start: Start, inputs: Iterable[Json], window: int, ordered: bool, results: Results
) -> Iterator[RowOutcome] | Iterator[tuple[int, RowOutcome]]:
    """Client.map, over `start`, which sends a list of rows."""
    chunk = max(1, window // CHUNKS)
    pairs = _in_order(start, inputs, chunk) if ordered else _as_completed(start, inputs, chunk)
    checked = (_checked(pair, results) for pair in pairs)
    return (outcome for _, outcome in checked) if ordered else checked


def _checked(pair: tuple[int, RowOutcome], results: Results) -> tuple[int, RowOutcome]:
    if results == "values" and isinstance(pair[1], MillstreamError):
        raise pair[1]
    return pair


def chunks(inputs: Iterable[Json], size: int) -> Iterator[tuple[int, list[Json]]]:
    """(index of the first, rows) of each chunk."""
    source, first = iter(inputs), 0
    while rows := list(islice(source, size)):
        yield first, rows
        first += len(rows)


def _in_order(start: Start, inputs: Iterable[Json], chunk: int) -> Iterator[tuple[int, RowOutcome]]:
    source = chunks(inputs, chunk)
    under_way: deque[tuple[int, Handle]] = deque()
    try:
        for first, rows in source:
            under_way.append((first, start(rows)))
            if len(under_way) == CHUNKS:
                yield from _collect(*under_way[0])
                under_way.popleft()
        while under_way:
            yield from _collect(*under_way[0])
            under_way.popleft()
    finally:
        for _, handle in under_way:
            handle.cancel_soon()


def _as_completed(start: Start, inputs: Iterable[Json], chunk: int) -> Iterator[tuple[int, RowOutcome]]:
    source = chunks(inputs, chunk)
    changed = threading.Event()
    under_way: dict[int, Handle] = {}
    try:
        with ExitStack() as listening:
            while True:
                for first, rows in islice(source, CHUNKS - len(under_way)):
                    under_way[first] = start(rows)
                    listening.enter_context(under_way[first].listening(changed.set))
                if not under_way:
                    return
                first = _first_ready(under_way, changed)
                yield from _collect(first, under_way[first])
                del under_way[first]
    finally:
        for handle in under_way.values():
            handle.cancel_soon()


def _first_ready(under_way: dict[int, Handle], changed: threading.Event) -> int:
    """The first call that is complete, waiting for one."""
    while True:
        changed.clear()
        # Nobody calls us when a call's time is over: that is noticed by waiting for it.
        for first, handle in under_way.items():
            if handle.wait(0):
                return first
        changed.wait(LOOK_S)


def _collect(first: int, handle: Handle) -> Iterator[tuple[int, RowOutcome]]:
    yield from enumerate(handle.outcomes(), start=first)
