"""Sinks of a bulk run: JSON lines, CSV, and arrays of vectors. Each writes one file for a shard."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import BinaryIO, Literal, Protocol, get_args

import numpy as np

from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.operations import Operation
from millstream.client.bulk.items import Result
from millstream.client.generate import Generated
from millstream.client.row_results import RowOutcome

OutputFormat = Literal["jsonl", "csv", "npy"]


class Sink(Protocol):
    """Output format of a bulk run."""

    def write(self, file: BinaryIO, results: Sequence[Result]) -> None:
        """Writes the results of one shard, in the order of the input. Raises InvalidRequest if they do not fit."""
        ...


def find_sink(name: OutputFormat, operation: Operation) -> Sink:
    """Returns the sink of a format. Raises InvalidRequest if it cannot hold the results of `operation`."""
    if name not in get_args(OutputFormat):
        raise InvalidRequest(f"format={name!r} is not valid", hint=f"one of {', '.join(get_args(OutputFormat))}")
    if name == "npy" and operation.results not in ("vectors", "any"):
        raise _no_vectors(f"the service's results are {operation.results}")
    return _SINKS[name]


class JsonlSink:
    """A line for each row that did not fail: {"row": 0, "id": ..., "result": ...}; a vector is a list of numbers.

    `id` is left out if the row has none. Numbers have enough digits to give the same float32 when read.
    """

    def write(self, file: BinaryIO, results: Sequence[Result]) -> None:
        for row, row_id, outcome in results:
            if not isinstance(outcome, MillstreamError):
                named = "" if row_id is None else f'"id":{json.dumps(row_id)},'
                file.write(f'{{"row":{row},{named}"result":{_to_json(outcome)}}}\n'.encode())


class CsvSink:
    """Columns row, id and result: a text as it is, everything else as JSON. Rows that failed are left out."""

    def write(self, file: BinaryIO, results: Sequence[Result]) -> None:
        # Texts of an input that is not valid Unicode may come back as ids.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
        records = csv.writer(text, lineterminator="\n")
        records.writerow(["row", "id", "result"])
        for row, row_id, outcome in results:
            if not isinstance(outcome, MillstreamError):
                records.writerow([row, "" if row_id is None else _to_text(row_id), _to_text(outcome)])
        text.detach()


class NpySink:
    """Array of vectors with a line for each row of the shard: NaN, or 0 for whole numbers, if the row failed."""

    def write(self, file: BinaryIO, results: Sequence[Result]) -> None:
        vectors = [result.outcome for result in results]
        for vector in vectors:
            if not isinstance(vector, np.ndarray | MillstreamError):
                raise _no_vectors(f"a result of the type {type(vector).__name__}")
        found = [vector for vector in vectors if isinstance(vector, np.ndarray)]
        if len({(vector.shape, vector.dtype) for vector in found}) > 1:
            raise _no_vectors("vectors of different lengths")
        shape, dtype = (found[0].shape, found[0].dtype) if found else ((0,), np.dtype(np.float32))
        missing = np.full(shape, np.nan if dtype.kind == "f" else 0, dtype)
        rows = [each if isinstance(each, np.ndarray) else missing for each in vectors]
        np.save(file, np.stack(rows), allow_pickle=False)


_SINKS: Mapping[str, Sink] = MappingProxyType({"jsonl": JsonlSink(), "csv": CsvSink(), "npy": NpySink()})


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
    return value if isinstance(value, str) else _to_json(value)


def _no_vectors(found: str) -> InvalidRequest:
    return InvalidRequest(f"the format npy takes dense vectors of one length, not {found}", hint="use jsonl or csv")
