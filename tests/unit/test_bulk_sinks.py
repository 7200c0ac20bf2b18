"""Sinks of bulk runs, and the files that they write: whole or not there."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelFailed
from millstream.broker.contract.operations import CALL, EMBED, GENERATE
from millstream.client import Generated
from millstream.client.bulk.files import write_whole
from millstream.client.bulk.items import Result
from millstream.client.bulk.sinks import OutputFormat, find_sink

RNG = np.random.default_rng(7)
VECTOR = (RNG.standard_normal(16) * 10.0 ** RNG.integers(-30, 30, 16)).astype(np.float32)


def written(layout: OutputFormat, *results: Result) -> bytes:
    file = io.BytesIO()
    find_sink(layout, CALL).write(file, results)
    return file.getvalue()


def test_json_lines_have_the_same_float32_and_no_failed_rows() -> None:
    text = written("jsonl", Result(3, "a", VECTOR), Result(4, "b", ModelFailed("no")), Result(5, None, {"x": [1]}))

    first, second = map(json.loads, text.splitlines())
    assert (np.asarray(first["result"], np.float32) == VECTOR).all()
    assert {**first, "result": None} == {"row": 3, "id": "a", "result": None}
    assert second == {"row": 5, "result": {"x": [1]}}


def test_csv_has_texts_as_they_are_and_everything_else_as_json() -> None:
    text = written(
        "csv",
        Result(0, "a,b", "line\none"),
        Result(1, 7, VECTOR),
        Result(2, None, Generated("a text", "stop")),
        Result(3, None, 0.5),
        Result(4, None, ModelFailed("no")),
    )

    rows = list(csv.reader(io.StringIO(text.decode(), newline="")))
    assert rows[0] == ["row", "id", "result"]
    assert rows[1] == ["0", "a,b", "line\none"]
    assert (np.asarray(json.loads(rows[2][2]), np.float32) == VECTOR).all()
    assert rows[3:] == [["2", "", "a text"], ["3", "", "0.5"]]


def test_an_array_has_a_line_for_each_row_and_nan_for_failed_ones() -> None:
    array = np.load(io.BytesIO(written("npy", Result(0, None, ModelFailed("no")), Result(1, None, VECTOR))))

    assert array.dtype == np.float32
    assert np.isnan(array[0]).all()
    assert (array[1] == VECTOR).all()


def test_an_array_takes_vectors_of_one_length_only() -> None:
    for other in ("text", VECTOR[:4]):
        with pytest.raises(InvalidRequest, match="npy"):
            written("npy", Result(0, None, VECTOR), Result(1, None, other))
    with pytest.raises(InvalidRequest, match="npy"):
        find_sink("npy", GENERATE)
    with pytest.raises(InvalidRequest, match="format"):
        find_sink("xml", EMBED)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["jsonl", "csv", "npy", "parquet", "openai"])
def test_a_full_disk_is_an_error_that_says_so(layout: OutputFormat) -> None:
    results = [Result(row, None, VECTOR, {"custom_id": "x" * 100}) for row in range(1_000)]

    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left on device"):
        find_sink(layout, CALL).write(full, results)


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(MillstreamError, match=r"part.* cannot be written: No space left on device"):
        write_whole(tmp_path / "part", fail)

    assert list(tmp_path.iterdir()) == []
