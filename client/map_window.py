"""Window of a map: decides how many calls to begin, which call to wait for, and which results to give out. Pure.

The blocking and the async map both drive it: `mapping.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.scalars import plain
from millstream.client.row_results import RowOutcome

Results = Literal["values", "outcomes"]

CALLS = 4
"""Calls in a window: the results of one are being read while the others are in flight."""


class _Call(Protocol):
    """Call of a map. It is asked for its outcomes when it is complete."""

    def outcomes(self) -> Sequence[RowOutcome]: ...


CallT = TypeVar("CallT", bound=_Call)


class MapWindow(Generic[CallT]):
    """Calls of one map that are in flight, the oldest first.

    `window` is the number of rows in flight at most. If `ordered` is False, results are given out with the index of
    their row, as soon as a call is complete. If `results` is "outcomes", errors are given out instead of raised.

    Raises InvalidRequest if `window` or `results` is wrong.
    """

    def __init__(self, window: int, ordered: bool, results: Results) -> None:
        rows = plain(window)
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise InvalidRequest(f"window={window!r} is not a number of rows above 0")
        if results not in get_args(Results):
            raise InvalidRequest(f"results={results!r} is not valid", hint=f"one of {', '.join(get_args(Results))}")
        self._most = min(CALLS, rows)
        self.rows_per_call = rows // self._most
        self._ordered = ordered
        self._raises = results == "values"
        self._in_flight: list[tuple[int, CallT]] = []
        self._next_row = 0

    @property
    def has_room(self) -> bool:
        """Whether the next call may begin."""
        return len(self._in_flight) < self._most

    def add(self, call: CallT, rows: int) -> None:
        """Adds a call, which has begun with the next `rows` rows."""
        self._in_flight.append((self._next_row, call))
        self._next_row += rows

    @property
    def awaited(self) -> list[CallT]:
        """Calls of which the next complete one is to be given out: the oldest if the order matters, otherwise all."""
        return [call for _, call in (self._in_flight[:1] if self._ordered else self._in_flight)]

    def give_out(self, place: int) -> Iterator[Any]:
        """Yields the results of a complete call, `awaited[place]`, and then removes the call.

        Raises the error of a row if errors are raised.
        """
        first, call = self._in_flight[place]
        for row, outcome in enumerate(call.outcomes(), start=first):
            if self._raises and isinstance(outcome, MillstreamError):
                raise outcome
            yield outcome if self._ordered else (row, outcome)
        del self._in_flight[place]

    def drop(self) -> list[CallT]:
        """Removes all calls and returns them, to be cancelled."""
        calls = [call for _, call in self._in_flight]
        self._in_flight = []
        return calls
