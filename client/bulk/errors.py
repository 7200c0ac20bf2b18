"""errors.jsonl of a bulk run: a line for each row that failed, with its number, its id and the reason."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, to_wire
from millstream.client.bulk.files import append, reading, writing
from millstream.client.bulk.items import Result
from millstream.client.bulk.manifest import ERRORS

_ROW = re.compile(rb'\{"row": (\d+),')
"""Begin of a line."""


def encode_errors(results: Iterable[Result]) -> dict[int, bytes]:
    """Returns the lines of those `results` that are errors, by the number of the row.

    `openai` of a line is the row's line of a batch's error file, if the input is a batch.
    """
    return {each.row: _encode(each, each.outcome) for each in results if isinstance(each.outcome, MillstreamError)}


def _encode(result: Result, error: MillstreamError) -> bytes:
    line: dict[str, object] = {"row": result.row, "id": result.id, "error": to_wire(error)}
    if result.line is not None:
        line["openai"] = result.line
    return json.dumps(line).encode() + b"\n"


def read_errors(path: Path, end: int) -> Iterator[tuple[int, bytes]]:
    """Yields the number of the row of each line before `end`, and the line. Raises InvalidRequest if it has none."""
    with reading(path), path.open("rb") as file:
        while file.tell() < end and (line := file.readline()):
            found = _ROW.match(line)
            if found is None:
                raise InvalidRequest(f"{path} has a line without a row", hint="it was changed: begin in a new folder")
            yield int(found[1]), line


def rewrite_errors(path: Path, end: int, lines: Mapping[int, bytes], file: BinaryIO) -> None:
    """Copies the lines before `end` to `file`, with those in `lines` in place of the rows' own."""
    for row, line in read_errors(path, end):
        file.write(lines.get(row, line))


class ErrorsFile:
    """Errors of a run, open for writing. `end` is the size that the manifest notes: what is behind it is removed.

    A line behind it belongs to a shard that was not finished, whose rows run again.
    """

    def __init__(self, folder: Path, end: int) -> None:
        self._path = folder / ERRORS
        self.end = end
        with writing(self._path):
            self._file = self._path.open("a+b", buffering=0)
            try:
                os.ftruncate(self._file.fileno(), end)
            except OSError:
                self._file.close()
                raise

    def append(self, results: Iterable[Result]) -> int:
        """Writes a line for each of `results` that is an error. Returns how many there are."""
        lines = encode_errors(results).values()
        if lines:
            with writing(self._path):
                append(self._file, b"".join(lines))
            self.end += sum(map(len, lines))
        return len(lines)

    def __enter__(self) -> ErrorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
