"""Types of a bulk run: rows as they are read, shards of rows, and results as they are written. Frozen data, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.client.openai.batch import BatchRequest
from millstream.client.row_results import RowOutcome


class RowCall(NamedTuple):
    """Operation and options that a row asks for by itself."""

    op: str
    options: Mapping[str, Json]


class Row(NamedTuple):
    """Row of an input. `value` is what is sent, or the reason why the row cannot be read. `id` None: it has none.

    `call` None: the row is sent with the operation and the options of the run.
    """

    id: Json
    value: Json | InvalidRequest
    call: RowCall | None = None


class Mark(NamedTuple):
    """Place in an input at which a shard begins: the shard's number, its first row's number, and its position.

    Numbers count from 0. Positions are bytes of a file, files of a folder, or rows of a Parquet file.
    """

    shard: int = 0
    row: int = 0
    position: int = 0

    def after(self, rows: int, position: int) -> Mark:
        """Returns the mark of the next shard, behind `rows` rows, at `position`."""
        return Mark(self.shard + 1, self.row + rows, position)


class Shard(NamedTuple):
    """Consecutive rows of an input, the unit of progress. `digest` is of the input between `begin` and `end`.

    If the input holds `requests`, each of them is a row of the input and of the output, and `rows` are what is sent for
    all of them, in order: a request may need several. `numbers` are those of the rows of the input, if some were left
    out: None if they are all between `begin` and `end`.
    """

    begin: Mark
    end: Mark
    rows: Sequence[Row]
    digest: str
    requests: Sequence[BatchRequest] | None = None
    numbers: Sequence[int] | None = None


class Result(NamedTuple):
    """Row of the output: its number in the input, its id, and its result or error.

    `line` is the row's line of a batch file in OpenAI's shape; None if the input is no such file.
    """

    row: int
    id: Json
    outcome: RowOutcome
    line: Mapping[str, Json] | None = None
