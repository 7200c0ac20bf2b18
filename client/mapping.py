"""Mapping: iterables of any length, sent through a bounded window of calls."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, Literal, get_args

from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.contract.scalars import plain
from millstream.client.handle import Handle
from millstream.client.row_results import RowOutcome

Results = Literal["values", "outcomes"]
Start = Callable[[Sequence[Json]], Handle]

LOOK_S = 0.5
"""Seconds between two checks whether a call's deadline is over."""

CHUNKS = 4
"""Calls in a window: the results of one are being read while the others are in flight."""


def map_rows(
    start: Start, inputs: Iterable[Json], window: int, ordered: bool, results: Results
) -> Generator[Any, None, None]:
    """Does as Client.map. `start` sends a list of rows as a call."""
    window = check_map(window, results)
    count, chunk = chunking(window)
    pairs = (_in_order if ordered else _as_completed)(start, chunks(inputs, chunk), count)
    return _yielded(pairs, ordered, results)


def check_map(window: int, results: Results) -> int:
    """Returns `window` as a Python int. Raises InvalidRequest if `window` or `results` is wrong."""
    rows = plain(window)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise InvalidRequest(f"window={window!r} is not a number of rows above 0")
    if results not in get_args(Results):
        raise InvalidRequest(f"results={results!r} is not valid", hint=f"one of {', '.join(get_args(Results))}")
    return rows


def chunking(window: int) -> tuple[int, int]:
    """Returns the number of calls in a window, and the rows of each."""
    count = min(CHUNKS, window)
    return count, window // count


def _yielded(
    pairs: Generator[tuple[int, RowOutcome], None, None], ordered: bool, results: Results
) -> Generator[Any, None, None]:
    # Closed here, because the traceback of a raised error would keep the generator and its calls alive.
    with closing(pairs):
        for row, outcome in pairs:
            if results == "values" and isinstance(outcome, MillstreamError):
                raise outcome
            yield outcome if ordered else (row, outcome)


def chunks(inputs: Iterable[Json], size: int) -> Iterator[tuple[int, list[Json]]]:
    """Yields (index of the first row, rows) of each chunk."""
    source, first = iter(inputs), 0
    while rows := list(islice(source, size)):
        yield first, rows
        first += len(rows)


def _in_order(
    start: Start, source: Iterator[tuple[int, list[Json]]], count: int
) -> Generator[tuple[int, RowOutcome], None, None]:
    under_way: deque[tuple[int, Handle]] = deque()
    try:
        for first, rows in source:
            under_way.append((first, start(rows)))
            if len(under_way) == count:
                yield from _collect(*under_way[0])
                under_way.popleft()
        while under_way:
            yield from _collect(*under_way[0])
            under_way.popleft()
    finally:
        for _, handle in under_way:
            handle.cancel_soon()


def _as_completed(
    start: Start, source: Iterator[tuple[int, list[Json]]], count: int
) -> Generator[tuple[int, RowOutcome], None, None]:
    under_way: dict[int, Handle] = {}
    try:
        while True:
            for first, rows in islice(source, count - len(under_way)):
                under_way[first] = start(rows)
            if not under_way:
                return
            first = _first_ready(under_way)
            yield from _collect(first, under_way[first])
            del under_way[first]
    finally:
        for handle in under_way.values():
            handle.cancel_soon()


def _first_ready(under_way: dict[int, Handle]) -> int:
    """Waits for a complete call and returns the index of its first row."""
    changed = threading.Event()
    handles = list(under_way.values())
    try:
        for handle in handles:
            handle.listen(changed.set)
        while True:
            changed.clear()
            # Listeners are not called at a call's deadline: `wait(0)` checks it.
            for first, handle in under_way.items():
                if handle.wait(0):
                    return first
            changed.wait(LOOK_S)
    finally:
        for handle in handles:
            handle.unlisten(changed.set)


def _collect(first: int, handle: Handle) -> Iterator[tuple[int, RowOutcome]]:
    yield from enumerate(handle.outcomes(), start=first)
