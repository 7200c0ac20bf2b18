"""Sinks of a bulk run: JSON lines, CSV, arrays of vectors, and OpenAI's batch lines. Each writes one file for a shard.

`parquet_sink.py` has the one for Parquet.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal, cast, get_args

import numpy as np

from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import Operation, ResultKind
from millstream.client.bulk.items import Result
from millstream.client.bulk.merging import Merge, Sink, merge_records
from millstream.client.bulk.parquet_sink import ParquetSink
from millstream.client.bulk.sources import raise_field_limit
from millstream.client.generate import Generated
from millstream.client.row_results import RowOutcome

OutputFormat = Literal["jsonl", "csv", "npy", "parquet", "openai"]

_SUFFIXES: Mapping[str, str] = MappingProxyType({"openai": "jsonl"})
"""Suffixes of formats that are not their names."""


def find_sink(name: OutputFormat, operation: Operation, *, bodies: bool = False) -> Sink:
    """Returns the sink of a format. Raises InvalidRequest if it cannot hold the results of `operation`.

    `bodies`: the results are bodies of answers in OpenAI's shape, whatever the operation is.
    """
    if name not in get_args(OutputFormat):
        raise InvalidRequest(f"format={name!r} is not valid", hint=f"one of {', '.join(get_args(OutputFormat))}")
    kind: ResultKind = "any" if bodies else operation.results
    if name == "npy" and (bodies or kind not in ("vectors", "any")):
        raise _no_vectors("answers in OpenAI's shape" if bodies else f"the service's results are {kind}")
    return ParquetSink(kind) if name == "parquet" else _SINKS[name]


def name_part(shard: int, name: str) -> str:
    """Returns the name of the file of a shard in the format `name`."""
    return f"part-{shard:06d}.{_SUFFIXES.get(name, name)}"


class JsonlSink:
    """A line for each row that did not fail: {"row": 0, "id": ..., "result": ...}; a vector is a list of numbers.

    `id` is left out if the row has none. Numbers have enough digits to give the same float32 when read.
    """

    def write(self, file: BinaryIO, results: Sequence[Result]) -> None:
        for result in results:
            if not isinstance(result.outcome, MillstreamError):
                file.write(self._encode(result))

    def merge(self, file: BinaryIO, before: Path, merge: Merge) -> None:
        lines = before.read_bytes().splitlines(keepends=True)
        for line in merge_records(before, lines, merge, self._encode):
            file.write(line)

    def _encode(self, result: Result) -> bytes:
        named = "" if result.id is None else f'"id":{json.dumps(result.id)},'
        return f'{{"row":{result.row},{named}"result":{_to_json(result.outcome)}}}\n'.encode()


class OpenAISink(JsonlSink):
    """A line of OpenAI's batch output file for each request that did not fail."""

    def _encode(self, result: Result) -> bytes:
        return json.dumps(result.line, separators=(",", ":")).encode() + b"\n"


class CsvSink:
    """Columns row, id and result: a text as it is, everything else as JSON. Rows that failed are left out."""

    def write(self, file: BinaryIO, results: Sequence[Result]) -> None:
        self._write(file, [self._encode(each) for each in results if not isinstance(each.outcome, MillstreamError)])

    def merge(self, file: BinaryIO, before: Path, merge: Merge) -> None:
        raise_field_limit()
        try:
            with before.open(encoding="utf-8", newline="") as opened:
                _, *records = csv.reader(opened)
        except csv.Error as error:
            raise InvalidRequest(f"{before} cannot be read: {error}") from error
        self._write(file, merge_records(before, records, merge, self._encode))

    def _write(self, file: BinaryIO, records: Sequence[Sequence[str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", "id", "result"])
        writer.writerows(records)
        # Texts of an input that is not valid Unicode may come back as ids.
        file.write(text.getvalue().encode(errors="backslashreplace"))

    def _encode(self, result: Result) -> Sequence[str]:
        return [str(result.row), "" if result.id is None else _to_text(result.id), _to_text(result.outcome)]


class NpySink:
    """Array of vectors with a line for each row of the shard: NaN, or 0 for whole numbers, if the row failed."""

    def write(self, file: BinaryIO, results: Sequence[Result]) -> None:
        self._write(file, [result.outcome for result in results])

    def merge(self, file: BinaryIO, before: Path, merge: Merge) -> None:
        rows = merge.spread(before, np.load(before, allow_pickle=False))
        self._write(file, [cast(RowOutcome, row.outcome if isinstance(row, Result) else row) for row in rows])

    def _write(self, file: BinaryIO, vectors: Sequence[RowOutcome]) -> None:
        for vector in vectors:
            if not isinstance(vector, np.ndarray | MillstreamError):
                raise _no_vectors(f"a result of the type {type(vector).__name__}")
        found = [vector for vector in vectors if isinstance(vector, np.ndarray)]
        if len({(vector.shape, vector.dtype) for vector in found}) > 1:
            raise _no_vectors("vectors of different lengths")
        shape, dtype = (found[0].shape, found[0].dtype) if found else ((0,), np.dtype(np.float32))
        missing = np.full(shape, np.nan if dtype.kind == "f" else 0, dtype)
        rows = [each if isinstance(each, np.ndarray) else missing for each in vectors]
        # NumPy writes to a file by itself, and on a full disk its error does not say so.
        whole = io.BytesIO()
        np.save(whole, np.stack(rows), allow_pickle=False)
        file.write(whole.getbuffer())


_SINKS: Mapping[str, Sink] = MappingProxyType(
    {"jsonl": JsonlSink(), "csv": CsvSink(), "npy": NpySink(), "openai": OpenAISink()}
)


_DIGITS: Mapping[str, str] = MappingProxyType({"e": "%.5g", "f": "%.9g", "d": "%.17g"})
"""Formats with enough digits to give the same number when read, by the character of a dtype: float16, 32 and 64."""


def _to_json(outcome: RowOutcome) -> str:
    if isinstance(outcome, np.ndarray):
        # One format for all numbers takes a quarter of the time of numpy's shortest digits, which matters to the rate.
        number = _DIGITS.get(outcome.dtype.char, "%d")
        return f"[{','.join([number] * len(outcome))}]" % tuple(outcome.tolist())
    return json.dumps(outcome.json() if isinstance(outcome, Generated) else outcome, separators=(",", ":"))


def _to_text(value: RowOutcome) -> str:
    if isinstance(value, Generated):
        return value.text
    return value if isinstance(value, str) else _to_json(cast(Json, value))


def _no_vectors(found: str) -> InvalidRequest:
    return InvalidRequest(f"the format npy takes dense vectors of one length, not {found}", hint="use jsonl or csv")
