"""Sources of a bulk run: JSON lines, CSV, lines of text, and folders of text files, read shard by shard.

`opening.py` chooses the source of an input.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.client.bulk.files import reading
from millstream.client.bulk.items import Mark, Row, Shard

LINE_BYTES = 4 * 1024 * 1024
"""Bytes of a line that are read at most. A row has at most MAX_ROW_BYTES, so a line that is cut fails as a row."""

SHARD_BYTES = 16 * 1024 * 1024
"""Bytes of input after which a shard ends, although it has fewer rows than others."""

Identity = dict[str, Json]
"""Identity of an input: fields that differ if the input was changed. `modified` may differ for an equal input."""


class Source(Protocol):
    """Input of a bulk run. Reading it twice gives the same shards."""

    def identify(self) -> Identity:
        """Returns the identity of the input as it is now."""
        ...

    def read_shards(self, begin: Mark) -> Iterator[Shard]:
        """Yields the shards from `begin` to the end."""
        ...

    def digest(self, start: int, end: int) -> str:
        """Returns the digest of the input between two positions, as a shard has it."""
        ...

    def length(self) -> int:
        """Returns the position of the input's end."""
        ...


class Lines:
    """Lines of a binary file from a position on, as text. Counts and digests all bytes that were read."""

    def __init__(self, file: BinaryIO, position: int) -> None:
        self.position = position
        self._file = file
        self._digest = hashlib.sha256()
        file.seek(position)

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        begin = line = self._read()
        if not line:
            raise StopIteration
        while len(line) == LINE_BYTES and not line.endswith(b"\n"):
            line = self._read()
        if self.position == len(begin):
            begin = begin.removeprefix(b"\xef\xbb\xbf")
        # Not decoded strictly: a row that is not UTF-8 fails alone.
        return begin.decode(errors="surrogateescape")

    def _read(self) -> bytes:
        line = self._file.readline(LINE_BYTES)
        self.position += len(line)
        self._digest.update(line)
        return line

    def take_digest(self) -> str:
        """Returns the digest of the lines since the last call."""
        digest, self._digest = self._digest.hexdigest(), hashlib.sha256()
        return digest


class LineSource:
    """File whose rows are lines. `read_rows` makes rows of lines, and reads no line before the row is needed."""

    def __init__(self, path: Path, shard_rows: int, read_rows: Callable[[Lines], Iterator[Row]]) -> None:
        self._path, self._shard_rows, self._read_rows = path, shard_rows, read_rows
        with reading(path), path.open("rb"):
            pass

    def identify(self) -> Identity:
        with reading(self._path):
            stat = self._path.stat()
        return {"size": stat.st_size, "modified": stat.st_mtime_ns}

    def read_shards(self, begin: Mark) -> Iterator[Shard]:
        with reading(self._path), self._path.open("rb") as file:
            lines = Lines(file, begin.position)
            rows = self._read_rows(lines)
            while shard := self._read_shard(lines, rows, begin):
                yield shard
                begin = shard.end

    def _read_shard(self, lines: Lines, rows: Iterator[Row], begin: Mark) -> Shard | None:
        found, count = list[Row](), 0
        for row in rows:
            found.append(row)
            count += self._count(row)
            if count >= self._shard_rows or lines.position - begin.position >= SHARD_BYTES:
                break
        if not found:
            return None
        return self._make_shard(begin, begin.after(len(found), lines.position), found, lines.take_digest())

    def _count(self, row: Row) -> int:
        """Returns how many rows are sent for a row of the input."""
        return 1

    def _make_shard(self, begin: Mark, end: Mark, rows: Sequence[Row], digest: str) -> Shard:
        return Shard(begin, end, rows, digest)

    def length(self) -> int:
        with reading(self._path):
            return self._path.stat().st_size

    def digest(self, start: int, end: int) -> str:
        digest = hashlib.sha256()
        with reading(self._path), self._path.open("rb") as file:
            file.seek(start)
            while start < end and (piece := file.read(min(LINE_BYTES, end - start))):
                digest.update(piece)
                start += len(piece)
        return digest.hexdigest()


class CsvSource(LineSource):
    """CSV file with a header. The column may be left out if there is only one beside the id."""

    def __init__(self, path: Path, shard_rows: int, column: str | None, id_column: str | None) -> None:
        super().__init__(path, shard_rows, self._read_records)
        raise_field_limit()
        with reading(path), path.open("rb") as file:
            lines = Lines(file, 0)
            header = next(csv.reader(lines), [])
            self._data_at = lines.position
        self._header = header
        self._value, self._id = find_columns(path, header, column, id_column)

    def identify(self) -> Identity:
        return {**super().identify(), "header": cast(Json, self._header)}

    def read_shards(self, begin: Mark) -> Iterator[Shard]:
        return super().read_shards(begin._replace(position=max(begin.position, self._data_at)))

    def _read_records(self, lines: Lines) -> Iterator[Row]:
        records = csv.reader(lines)
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(None, InvalidRequest(f"not a CSV record: {error}"))
                continue
            if record:
                row_id = record[self._id] if self._id is not None and self._id < len(record) else None
                yield Row(row_id, self._value_of(record))

    def _value_of(self, record: Sequence[str]) -> Json | InvalidRequest:
        if self._value < len(record):
            return record[self._value]
        return InvalidRequest(f"the record has {len(record)} fields", hint="the header names more")


def raise_field_limit() -> None:
    """Lets the csv module read texts of LINE_BYTES. Its limit is one for the whole process, and is only raised."""
    csv.field_size_limit(max(csv.field_size_limit(), LINE_BYTES))


def find_columns(
    path: Path, header: Sequence[str], column: str | None, id_column: str | None
) -> tuple[int, int | None]:
    """Returns the indexes of the column to send and of the id. Raises InvalidRequest if there is no such column."""
    named = ", ".join(map(repr, header[:20])) or "none"
    for name in (column, id_column):
        if name is not None and name not in header:
            raise InvalidRequest(f"{path} has no column {name!r}", hint=f"its header has {named}")
    if column is None:
        others = [name for name in header if name != id_column]
        if len(others) != 1:
            raise InvalidRequest(f"{path} has {len(others)} columns to send", hint=f"give --column, one of {named}")
        column = others[0]
    return header.index(column), None if id_column is None else header.index(id_column)


def read_text(lines: Lines) -> Iterator[Row]:
    """Yields each line as a row."""
    for line in lines:
        yield Row(None, line.removesuffix("\n").removesuffix("\r"))


def read_json(lines: Lines, column: str | None, id_column: str | None) -> Iterator[Row]:
    """Yields the row of each line with a JSON value."""
    for line in lines:
        if line.strip():
            yield _make_row(line, column, id_column)


def parse(line: str) -> Json | InvalidRequest:
    """Returns the JSON value of a line, or the error if it has none."""
    try:
        return cast(Json, _DECODER.decode(line))
    except (ValueError, RecursionError) as error:
        return InvalidRequest(f"not JSON: {error}"[:200])


def _make_row(line: str, column: str | None, id_column: str | None) -> Row:
    """Returns the row of a line: all of its JSON value, or one field of it."""
    value = parse(line)
    if isinstance(value, InvalidRequest):
        return Row(None, value)
    if column is None and id_column is None:
        return Row(None, value)
    if not isinstance(value, dict):
        return Row(None, InvalidRequest("not a JSON object", hint="it has no columns"))
    row_id = None if id_column is None else value.get(id_column)
    if id_column is not None and row_id is None:
        return Row(None, InvalidRequest(f"no field {id_column!r}", hint="it is the row's id"))
    if column is None:
        return Row(row_id, {name: each for name, each in value.items() if name != id_column})
    if column not in value:
        return Row(row_id, InvalidRequest(f"no field {column!r}"))
    return Row(row_id, value[column])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
"""One for all rows: `json.loads` with a parse_constant would make one for each."""


class FolderSource:
    """Folder of text files, each one row. The id of a row is the file's path in the folder.

    Rows are in the order of these paths. Hidden files and links are left out. All paths are held in memory.
    """

    def __init__(self, path: Path, shard_rows: int) -> None:
        self._path, self._shard_rows = path, shard_rows
        with reading(path):
            self._names = sorted(_find_files(path))
        if not self._names:
            raise InvalidRequest(f"{path} has no files" if path.is_dir() else f"{path} is no folder")

    def identify(self) -> Identity:
        digest, times = hashlib.sha256(), hashlib.sha256()
        with reading(self._path):
            for name in self._names:
                stat = (self._path / name).stat()
                digest.update(f"{name}\0{stat.st_size}\0".encode(errors="surrogateescape"))
                times.update(f"{stat.st_mtime_ns}\0".encode())
        return {"files": len(self._names), "names and sizes": digest.hexdigest(), "modified": times.hexdigest()}

    def length(self) -> int:
        return len(self._names)

    def read_shards(self, begin: Mark) -> Iterator[Shard]:
        while names := self._names[begin.position : begin.position + self._shard_rows]:
            rows, digest, size = list[Row](), hashlib.sha256(), 0
            for name in names:
                content = self._read(name)
                size += len(content)
                digest.update(content)
                rows.append(Row(name, content.decode(errors="surrogateescape")))
                if size >= SHARD_BYTES:
                    break
            end = begin.after(len(rows), begin.position + len(rows))
            yield Shard(begin, end, rows, digest.hexdigest())
            begin = end

    def _read(self, name: str) -> bytes:
        file = self._path / name
        with reading(file), file.open("rb") as opened:
            return opened.read(LINE_BYTES)

    def digest(self, start: int, end: int) -> str:
        digest = hashlib.sha256()
        for name in self._names[start:end]:
            digest.update(self._read(name))
        return digest.hexdigest()


def _find_files(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            file = Path(root, name)
            if not name.startswith(".") and file.is_file() and not file.is_symlink():
                yield file.relative_to(folder).as_posix()
