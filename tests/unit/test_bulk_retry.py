"""`retry_failed`: rows that failed run again, and shards are whole and in order, whatever ends the process."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelFailed
from millstream.client import BulkProgress
from millstream.client.bulk import plan, retry
from millstream.client.bulk.manifest import Manifest, read_manifest
from millstream.client.testing import SERVICE, FakeClient

LONG = os.environ.get("MILLSTREAM_LONG") == "1"

ROWS, SHARD_ROWS = 40, 10
TEXTS = [f"text {row}, and more" for row in range(ROWS)]
BAD = (3, 4, 10, 29, *range(30, 40))
"""Rows that fail first: in the middle and at the ends of shards, and a whole shard."""

WORSE = (4, 31)
"""Rows that fail again."""


def failing(*rows: int, reason: str = "first") -> FakeClient:
    return FakeClient(dim=4, errors={TEXTS[row]: ModelFailed(reason) for row in rows})


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "STEP_SHARDS", 2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"key": f"k,{row}", "text": text}) + "\n" for row, text in enumerate(TEXTS)))
    return path


def run(client: FakeClient, source: Path, output: Path, **more: Any) -> BulkProgress:
    given = {"column": "text", "id_column": "key", "shard_rows": SHARD_ROWS, **more}
    return client.bulk(SERVICE, source, output, **given)


def errors_of(output: Path) -> dict[int, str]:
    lines = map(json.loads, (output / "errors.jsonl").read_text().splitlines())
    return {line["row"]: line["error"]["message"] for line in lines}


def rows_of(output: Path) -> list[int]:
    parts = sorted(output.glob("part-*.jsonl"))
    return [json.loads(line)["row"] for part in parts for line in part.read_text().splitlines()]


def check(output: Path, again: tuple[int, ...] = WORSE) -> None:
    assert rows_of(output) == [row for row in range(ROWS) if row not in again]
    assert list(errors_of(output)) == list(again)
    record, _ = read_manifest(output)
    assert sum(note.failed for note in record.notes) == len(again)
    assert not list(output.glob(".*"))


def parts_of(layout: str, output: Path) -> list[Any]:
    """The row of each result of a run, with its first number; None for a row without one."""
    parts = sorted(output.glob(f"part-*.{layout}"))
    if layout == "npy":
        vectors = [vector for part in parts for vector in np.load(part)]
        return [None if np.isnan(vector).any() else vector[0].item() for vector in vectors]
    if layout == "parquet":
        return [vector and vector[0] for part in parts for vector in pq.read_table(part)["vector"].to_pylist()]
    found: list[Any] = [None] * ROWS
    for part in parts:
        with part.open(newline="") as file:
            records = list(csv.DictReader(file)) if layout == "csv" else [json.loads(line) for line in file]
        for record in records:
            vector = json.loads(record["result"]) if layout == "csv" else record["result"]
            assert record["id"] == f"k,{record['row']}"
            found[int(record["row"])] = np.float32(vector[0]).item()
    return found


@pytest.mark.parametrize("layout", ["jsonl", "csv", "npy", "parquet"])
def test_rows_that_succeed_now_are_in_their_places_and_the_others_have_their_new_reason(
    source: Path, tmp_path: Path, layout: str
) -> None:
    output, steps = tmp_path / "out", list[BulkProgress]()
    run(failing(*BAD), source, output, format=layout)

    done = failing(*WORSE, reason="second").retry_failed(output, progress=steps.append)

    assert (done.rows, done.failed, done.share) == (len(BAD), len(WORSE), 1.0)
    assert [each.rows for each in steps] == [0, 3, 14]
    assert {each.workers for each in steps} == {1}
    assert errors_of(output) == dict.fromkeys(WORSE, "second")
    vectors = FakeClient(dim=4).embed(TEXTS)
    expected = [None if row in WORSE else vectors[row][0].item() for row in range(ROWS)]
    assert parts_of(layout, output) == expected
    assert sum(note.failed for note in read_manifest(output)[0].notes) == len(WORSE)
    assert FakeClient(dim=4).retry_failed(output).failed == 0
    assert errors_of(output) == {}
    assert None not in parts_of(layout, output)


def test_only_failed_rows_run_again_and_parts_without_a_new_result_stay(source: Path, tmp_path: Path) -> None:
    output, client = tmp_path / "out", failing(4, *range(30, 40))
    run(failing(*BAD), source, output)
    before = {part.name: part.stat().st_ino for part in output.glob("part-*")}

    client.retry_failed(output)

    assert sorted(str(text) for call in client.calls for text in call.inputs) == sorted(TEXTS[row] for row in BAD)
    same = {part.name for part in output.glob("part-*") if part.stat().st_ino == before[part.name]}
    assert same == {"part-000003.jsonl"}


def test_requests_in_openais_shape_are_tried_again_as_a_whole(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    requests = [
        {"custom_id": f"id-{row}", "method": "POST", "url": "/v1/embeddings", "body": {"input": [text, "same"]}}
        for row, text in enumerate(TEXTS)
    ]
    requests[20]["body"] = {"input": "a", "wrong": 1}
    source.write_text("".join(json.dumps(each) + "\n" for each in requests))
    failing(*BAD).bulk(SERVICE, source, output, input_format="openai", format="openai", shard_rows=SHARD_ROWS)

    done = failing(*WORSE).retry_failed(output)

    assert (done.rows, done.failed) == (len(BAD) + 1, len(WORSE) + 1)
    lines = [json.loads(line) for part in sorted(output.glob("part*")) for line in part.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"id-{row}" for row in range(ROWS) if row not in (*WORSE, 20)]
    assert all(len(line["response"]["body"]["data"]) == 2 for line in lines)
    assert len({line["id"] for line in lines}) == len(lines)


def test_a_run_that_was_not_finished_goes_on_behind_its_retried_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(plan, "GROUP_SHARDS", 1)

    def end(progress: BulkProgress) -> None:
        if len(read_manifest(output)[0].notes) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(failing(*BAD), source, output, progress=end)
    failing(4, reason="second").retry_failed(output)

    run(failing(*WORSE, reason="third"), source, output)

    check(output)
    assert errors_of(output) == {4: "second", 31: "third"}


MOMENTS = """
import os, shutil, sys
from pathlib import Path
from unit.test_bulk_retry import failing, WORSE, retry
retry.STEP_SHARDS = 2
source, after = Path(sys.argv[1]), sys.argv[2] == "after"

def die_at(moment):
    done = 0
    for name in ("fsync", "replace"):
        def call(*words, real=getattr(os, name), **more):
            nonlocal done
            done += 1
            if done == moment and not after:
                os._exit(7)
            result = real(*words, **more)
            if done == moment:
                os._exit(7)
            return result
        setattr(os, name, call)

for moment in range(1, 100):
    folder = source.with_name(f"out{moment}")
    shutil.copytree(source, folder)
    if not (child := os.fork()):
        die_at(moment)
        failing(*WORSE, reason="second").retry_failed(folder)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(moment)
"""


@pytest.mark.parametrize("when", ["before", "after"] if LONG else ["after"])
def test_a_process_that_is_killed_at_any_moment_leaves_each_shard_old_or_new(
    source: Path, tmp_path: Path, when: str
) -> None:
    run(failing(*BAD), source, tmp_path / "out")
    old = {part.name: part.read_bytes() for part in (tmp_path / "out").glob("part-*")}
    shutil.copytree(tmp_path / "out", tmp_path / "new")
    failing(*WORSE).retry_failed(tmp_path / "new")
    new = {part.name: part.read_bytes() for part in (tmp_path / "new").glob("part-*")}

    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}
    words = [sys.executable, "-c", MOMENTS, str(tmp_path / "out"), when]
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=True)

    moments = int(found.stdout)
    # Two steps, with five files, errors.jsonl twice, and two notes.
    assert moments > 20
    for moment in range(1, moments + 1):
        output = tmp_path / f"out{moment}"
        for part in output.glob("part-*"):
            assert part.read_bytes() in (old[part.name], new[part.name]), (moment, part.name)
        # No row is ever in neither file; the next process that opens the run ends what a rename had begun.
        assert {*rows_of(output), *errors_of(output)} == set(range(ROWS)), moment
        Manifest(output).close()
        rows, errors = rows_of(output), errors_of(output)
        assert sorted([*rows, *errors]) == list(range(ROWS)), moment
        assert sum(note.failed for note in read_manifest(output)[0].notes) == len(errors), moment
        failing(*WORSE, reason="second").retry_failed(output)
        check(output)
        for part in output.glob("part-*"):
            assert part.read_bytes() == new[part.name], (moment, part.name)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_at_any_moment_ends_the_retry_and_the_next_one_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run(failing(*BAD), source, tmp_path / "out")
    real, count = getattr(os, name), 0

    def fill_up_at(moment: int) -> Callable[..., object]:
        def call(*words: Any) -> object:
            nonlocal count
            count += 1
            if count == moment:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*words)

        return call

    def fails_at(moment: int, output: Path) -> bool:
        nonlocal count
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fill_up_at(moment))
            try:
                failing(*WORSE).retry_failed(output)
            except MillstreamError as error:
                return "No space left on device" in error.message and "same command" in error.hint
        return count >= moment

    moment = 1
    while fails_at(moment, output := Path(shutil.copytree(tmp_path / "out", tmp_path / f"out{moment}"))):
        failing(*WORSE).retry_failed(output)
        check(output)
        moment += 1
    assert moment > 8
    assert count < moment, "an error was not that of a full disk"


def test_what_does_not_fit_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(InvalidRequest, match="cannot be read"):
        FakeClient().retry_failed(output)
    assert not output.exists()
    run(failing(*BAD), source, output)
    source.rename(tmp_path / "moved.jsonl")
    with pytest.raises(InvalidRequest, match=r"in\.jsonl cannot be read"):
        FakeClient(dim=4).retry_failed(output)
    lines = (output / "part-000000.jsonl").read_bytes()
    (output / "part-000000.jsonl").write_bytes(lines.partition(b"\n")[2])
    with pytest.raises(InvalidRequest, match="has 7 results, and the run wrote 8"):
        FakeClient(dim=4).retry_failed(output, input=tmp_path / "moved.jsonl")
    (output / "part-000000.jsonl").write_bytes(lines)
    (output / "errors.jsonl").write_bytes(b"")
    with pytest.raises(InvalidRequest, match=r"errors\.jsonl does not have the 2 failed rows of part-000000"):
        FakeClient(dim=4).retry_failed(output, input=tmp_path / "moved.jsonl")
    (tmp_path / "moved.jsonl").write_text((tmp_path / "moved.jsonl").read_text().replace("text 3,", "TEXT 3,"))
    with pytest.raises(InvalidRequest, match="the input differs in rows 0 to 9"):
        FakeClient(dim=4).retry_failed(output, input=tmp_path / "moved.jsonl")
