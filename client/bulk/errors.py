"""errors.jsonl of a bulk run: a line for each row that failed, with its number, its id and the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from millstream.broker.contract.errors import MillstreamError, to_wire
from millstream.client.bulk.files import append, writing
from millstream.client.bulk.items import Result
from millstream.client.bulk.manifest import ERRORS


def encode_error(result: Result, error: MillstreamError) -> bytes:
    """Returns the line of a row that failed. `openai` has the row's line of a batch's error file, if it has one."""
    line: dict[str, object] = {"row": result.row, "id": result.id, "error": to_wire(error)}
    if result.line is not None:
        line["openai"] = result.line
    return json.dumps(line).encode() + b"\n"


class ErrorsFile:
    """Errors of a run, open for writing. `end` is the size that the manifest notes: what is behind it is removed.

    A line behind it belongs to a shard that was not finished, whose rows run again.
    """

    def __init__(self, folder: Path, end: int) -> None:
        self._path = folder / ERRORS
        self.end = end
        with writing(self._path):
            self._file = self._path.open("a+b", buffering=0)
            os.ftruncate(self._file.fileno(), end)

    def append(self, results: Iterable[Result]) -> int:
        """Writes a line for each of `results` that is an error. Returns how many there are."""
        lines = [
            encode_error(result, result.outcome) for result in results if isinstance(result.outcome, MillstreamError)
        ]
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
