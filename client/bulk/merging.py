"""Merging of results into the file of a finished shard: of rows that failed before, and now have a result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, TypeVar

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelFailed
from millstream.client.bulk.items import Result

T = TypeVar("T")


class Merge(NamedTuple):
    """Change of a shard's file. `rows` are the numbers of the shard's rows, and `failed` of those without a result.

    `results` are the new outcomes of rows in `failed`, by number.
    """

    rows: range
    failed: Collection[int]
    results: dict[int, Result]

    def spread(self, before: Path, records: Sequence[T]) -> list[T | Result | MillstreamError]:
        """Returns for each row its record in a file that has one for every row, its new result, or an error.

        Raises InvalidRequest if the file has another number of rows.
        """
        _check(before, len(records), len(self.rows))
        return [
            record if number not in self.failed else self.results.get(number, ModelFailed("no result"))
            for number, record in zip(self.rows, records, strict=True)
        ]


class Sink(Protocol):
    """Output format of a bulk run."""

    def write(self, file: BinaryIO, results: Sequence[Result]) -> None:
        """Writes the results of one shard, in the order of the input. Raises InvalidRequest if they do not fit."""
        ...

    def merge(self, file: BinaryIO, before: Path, merge: Merge) -> None:
        """Writes the shard that the file `before` holds, with the new results. Raises InvalidRequest, OSError."""
        ...


def merge_records(before: Path, records: Sequence[T], merge: Merge, encode: Callable[[Result], T]) -> list[T]:
    """Returns the records of a file that has one for each row with a result, with those of the new results.

    Raises InvalidRequest if the file has another number of records.
    """
    _check(before, len(records), len(merge.rows) - len(merge.failed))
    known, merged = iter(records), list[T]()
    for number in merge.rows:
        if number not in merge.failed:
            merged.append(next(known))
        elif (result := merge.results.get(number)) and not isinstance(result.outcome, MillstreamError):
            merged.append(encode(result))
    return merged


def _check(before: Path, found: int, expected: int) -> None:
    if found != expected:
        raise InvalidRequest(
            f"{before} has {found} results, and the run wrote {expected}", hint="it was changed: begin in a new folder"
        )
