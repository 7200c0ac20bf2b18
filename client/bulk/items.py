"""Types of a bulk run: rows as they are read, shards of rows, and results as they are written. Frozen data, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.client.row_results import RowOutcome


class Row(NamedTuple):
    """Row of an input. `value` is what is sent, or the reason why the row cannot be read. `id` None: it has none."""

    id: Json
    value: Json | InvalidRequest


class Mark(NamedTuple):
    """Place in an input at which a shard begins: the shard's number, its first row's number, and its position.

    Numbers count from 0. Positions are bytes of a file, or files of a folder.
    """

    shard: int = 0
    row: int = 0
    position: int = 0


class Shard(NamedTuple):
    """Consecutive rows of an input, the unit of progress. `digest` is of the input between `begin` and `end`."""

    begin: Mark
    end: Mark
    rows: Sequence[Row]
    digest: str


class Result(NamedTuple):
    """Row of the output: its number in the input, its id, and its result or error."""

    row: int
    id: Json
    outcome: RowOutcome
