"""Source of a bulk run: a Parquet file, read batch by batch in bounded memory. Needs pyarrow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.client.bulk import sources
from millstream.client.bulk.items import Mark, Row, Shard
from millstream.client.bulk.pyarrow_loading import load_pyarrow, reading_parquet
from millstream.client.bulk.sources import Identity, find_columns

BATCH_ROWS = 256
"""Rows that are decoded at once."""

BUFFER_BYTES = 1024 * 1024
"""Bytes of a column that are read at once. Without a buffer a whole column of a row group is."""


class _Read(NamedTuple):
    row: Row
    encoded: bytes
    """Id and value as they count for the digest."""


class ParquetSource:
    """Parquet file with named columns. The column may be left out if there is only one beside the id.

    Positions are rows of the file. The footer says in which row group a row is, so earlier groups are not read.
    """

    def __init__(self, path: Path, shard_rows: int, column: str | None, id_column: str | None) -> None:
        self._path, self._shard_rows = path, shard_rows
        with self._open() as file:
            self._names = list(file.schema_arrow.names)
            self._group_rows = [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)]
        value, row_id = find_columns(path, self._names, column, id_column)
        self._column, self._id = self._names[value], None if row_id is None else self._names[row_id]

    def identify(self) -> Identity:
        with reading_parquet(self._path):
            stat = self._path.stat()
        columns = cast(Json, self._names)
        return {"size": stat.st_size, "modified": stat.st_mtime_ns, "rows": self.length(), "columns": columns}

    def length(self) -> int:
        return sum(self._group_rows)

    def read_shards(self, begin: Mark) -> Iterator[Shard]:
        rows = self._read_rows(begin.position)
        while shard := self._read_shard(rows, begin):
            yield shard
            begin = shard.end

    def _read_shard(self, rows: Iterator[_Read], begin: Mark) -> Shard | None:
        found, digest, size = list[Row](), hashlib.sha256(), 0
        for row, encoded in islice(rows, self._shard_rows):
            found.append(row)
            digest.update(encoded)
            size += len(encoded)
            if size >= sources.SHARD_BYTES:
                break
        if not found:
            return None
        return Shard(begin, begin.after(len(found), begin.position + len(found)), found, digest.hexdigest())

    def digest(self, start: int, end: int) -> str:
        digest = hashlib.sha256()
        for _, encoded in islice(self._read_rows(start), end - start):
            digest.update(encoded)
        return digest.hexdigest()

    def _read_rows(self, position: int) -> Iterator[_Read]:
        """Yields the rows from `position` on. Decodes only the row groups from that row's group on."""
        group, skipped = 0, 0
        while group < len(self._group_rows) and skipped + self._group_rows[group] <= position:
            skipped += self._group_rows[group]
            group += 1
        columns = list(dict.fromkeys(name for name in (self._column, self._id) if name is not None))
        with reading_parquet(self._path), self._open() as file:
            groups = list(range(group, len(self._group_rows)))
            # Without groups pyarrow would read all of them.
            if not groups:
                return
            batches = file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False)
            yield from islice(self._read_batches(batches), position - skipped, None)

    def _read_batches(self, batches: Iterator[Any]) -> Iterator[_Read]:
        for batch in batches:
            values = batch.column(batch.schema.get_field_index(self._column)).to_pylist()
            ids = [None] * len(values)
            if self._id is not None:
                ids = batch.column(batch.schema.get_field_index(self._id)).to_pylist()
            for row_id, value in zip(ids, values, strict=True):
                yield self._read_row(row_id, value)

    def _read_row(self, row_id: Any, value: Any) -> _Read:
        row_id, value = _plain_id(row_id), value.decode(errors="surrogateescape") if type(value) is bytes else value
        if value is None:
            return _Read(Row(row_id, InvalidRequest(f"null in column {self._column!r}")), _encode(row_id, None))
        try:
            return _Read(Row(row_id, value), _encode(row_id, value))
        except (TypeError, ValueError) as error:
            reason = InvalidRequest(f"column {self._column!r} is no JSON value: {error}"[:300], hint="convert it first")
            return _Read(Row(row_id, reason), _encode(row_id, repr(value)))

    def _open(self) -> Any:
        _, parquet = load_pyarrow()
        with reading_parquet(self._path):
            return parquet.ParquetFile(self._path, buffer_size=BUFFER_BYTES, pre_buffer=False)


def _plain_id(value: Any) -> Json:
    """Returns an id as JSON has it. Dates, decimals and other types become their text."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _encode(row_id: Json, value: Any) -> bytes:
    return json.dumps([row_id, value], allow_nan=False).encode() + b"\n"
