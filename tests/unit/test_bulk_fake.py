"""Bulk runs of a FakeClient: what a program's tests see without a server, and results of every kind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from millstream.broker.contract.errors import InvalidRequest, ModelFailed
from millstream.client.testing import GENERATOR, SERVICE, FakeClient

TEXTS = [f"text {row} " + "x" * (row * 7 % 30) for row in range(25)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


def test_vectors_come_as_arrays_in_the_order_of_the_input(source: Path, tmp_path: Path) -> None:
    client = FakeClient()

    done = client.bulk(SERVICE, source, tmp_path / "out", format="npy", shard_rows=10)

    parts = [np.load(part) for part in sorted((tmp_path / "out").glob("part-*.npy"))]
    assert [len(part) for part in parts] == [10, 10, 5]
    assert (np.concatenate(parts) == np.asarray(client.embed(TEXTS))).all()
    assert (done.rows, done.failed) == (25, 0)


def test_a_row_whose_model_failed_is_nan_and_an_error(source: Path, tmp_path: Path) -> None:
    client = FakeClient(errors={TEXTS[7]: ModelFailed("no")})

    client.bulk(SERVICE, source, tmp_path / "out", format="npy")

    vectors = np.load(tmp_path / "out" / "part-000000.npy")
    assert np.isnan(vectors).any(axis=1).nonzero()[0].tolist() == [7]
    (error,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert (error["row"], error["error"]["code"]) == (7, "model_failed")


def test_texts_have_their_finish_reason_and_usage(source: Path, tmp_path: Path) -> None:
    FakeClient().bulk(GENERATOR, source, tmp_path / "out", max_tokens=5)

    lines = [json.loads(line) for line in (tmp_path / "out" / "part-000000.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(25))
    assert {"text", "finish_reason", "usage"} <= lines[0]["result"].keys()


def test_an_option_that_the_model_would_refuse_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path
) -> None:
    for options in ({"max_tokens": 0}, {"no_such_option": 1}):
        with pytest.raises(InvalidRequest):
            FakeClient().bulk(GENERATOR, source, tmp_path / "out", **options)  # type: ignore[arg-type]
    for numbers in ({"shard_rows": 0}, {"window": 0}, {"window": True}):
        with pytest.raises(InvalidRequest, match="above 0"):
            FakeClient().bulk(SERVICE, source, tmp_path / "out", **numbers)

    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_only_touched_goes_on_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for row, text in enumerate(TEXTS):
        (folder / f"{row:03}").write_text(text)
    FakeClient().bulk(SERVICE, folder, tmp_path / "out", shard_rows=10)

    os.utime(folder / "012", ns=(1, 1))
    FakeClient().bulk(SERVICE, folder, tmp_path / "out", shard_rows=10)
    (folder / "012").write_text(TEXTS[12].upper())
    with pytest.raises(InvalidRequest, match="the input differs in rows 10 to 19"):
        FakeClient().bulk(SERVICE, folder, tmp_path / "out", shard_rows=10)
    (folder / "012").write_text("longer " * 10)
    with pytest.raises(InvalidRequest, match=r"input\.names and sizes was"):
        FakeClient().bulk(SERVICE, folder, tmp_path / "out", shard_rows=10)
