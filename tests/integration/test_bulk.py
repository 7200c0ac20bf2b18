"""Bulk runs against a real server: results exact and in order, whatever ended the run before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bystander import Bystander
from support import eventually
from workers import LONG_S
from workers import spec as echo_spec

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, UnknownService
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection
from millstream.client import BulkProgress, Client
from millstream.client.bulk import sending
from millstream.client.bulk.manifest import Manifest, read_manifest


class Ended(Exception):
    """Ends a run, as the end of its process would."""


def write_rows(path: Path, count: int, bad: int = 0) -> None:
    """Rows of different lengths with ids; every tenth has no text, until `bad` are written."""
    with path.open("w") as file:
        for row in range(count):
            text: Any = 5 if row % 10 == 3 and row // 10 < bad else f"row {row} " + "x" * (row * 7 % 50)
            file.write(json.dumps({"key": f"k{row}", "text": text}) + "\n")


def results_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(output.glob("part-*.jsonl")) for line in part.read_text().splitlines()]


def errors_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]


def check(output: Path, count: int, bad: int) -> None:
    results, errors = results_of(output), errors_of(output)
    failed = [10 * at + 3 for at in range(bad)]
    assert [each["row"] for each in errors] == failed
    assert [each["id"] for each in errors] == [f"k{row}" for row in failed]
    assert [each["row"] for each in results] == [row for row in range(count) if row not in set(failed)]
    for each in results:
        assert each["id"] == f"k{each['row']}"
        assert each["result"].startswith(f"row {each['row']} ")


def run(client: Client, service: str, source: Path, output: Path, **more: Any) -> BulkProgress:
    given = {"column": "text", "id_column": "key", "shard_rows": 50, **more}
    return client.bulk(service, source, output, **given)


def end_after(shards: int) -> Callable[[BulkProgress], None]:
    """Ends the run once so many shards are noted, or a few more: those of a group are noted together."""

    def report(progress: BulkProgress) -> None:
        if len(read_manifest(progress.output)[0].notes) >= shards:
            raise Ended

    return report


@contextmanager
def serving(service: Bystander) -> Iterator[list[int]]:
    """A worker that answers one job after the other. Yields the depths of the queue that it saw."""
    over, depths = threading.Event(), list[int]()

    def serve() -> None:
        while not over.is_set():
            depths.append(service.queue.depth())
            service.answer(*service.queue.claim("bystander", jobs=1).claims)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield depths
    finally:
        over.set()
        thread.join(LONG_S)


def test_every_row_has_one_result_in_order_and_bad_rows_are_errors(client: Client, echo: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 1_000, bad=20)

    progress = run(client, echo, tmp_path / "in.jsonl", tmp_path / "out")

    check(tmp_path / "out", 1_000, 20)
    assert (progress.rows, progress.failed, progress.share) == (1_000, 20, 1.0)
    assert errors_of(tmp_path / "out")[0]["error"]["code"] == "invalid_request"


def test_a_run_that_ended_goes_on_and_never_does_a_finished_shard_again(
    client: Client, echo: str, tmp_path: Path
) -> None:
    write_rows(tmp_path / "in.jsonl", 1_000, bad=20)
    with pytest.raises(Ended):
        run(client, echo, tmp_path / "in.jsonl", tmp_path / "out", progress=end_after(8))
    before = {part.name: part.stat().st_mtime_ns for part in (tmp_path / "out").glob("part-*")}

    run(client, echo, tmp_path / "in.jsonl", tmp_path / "out")

    assert len(before) == 8
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before
    check(tmp_path / "out", 1_000, 20)


def test_a_finished_run_does_nothing_more(client: Client, echo: str, connection: Connection, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 100)
    run(client, echo, tmp_path / "in.jsonl", tmp_path / "out")
    entries = connection.client.xinfo_stream(ServiceKeys(echo).stream("batch"))["entries-added"]  # type: ignore[arg-type]

    progress = run(client, echo, tmp_path / "in.jsonl", tmp_path / "out")

    assert progress.rows == 100
    assert connection.client.xinfo_stream(ServiceKeys(echo).stream("batch"))["entries-added"] == entries  # type: ignore[arg-type]


def test_no_result_stays_on_the_server(client: Client, echo: str, connection: Connection, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 500)

    def find_results() -> set[bytes]:
        return set(connection.client.scan_iter(match=f"ms:{{{echo}}}:call:*", count=1000))

    before = find_results()
    run(client, echo, tmp_path / "in.jsonl", tmp_path / "out")

    eventually(lambda: find_results() <= before)


def test_rows_that_are_in_the_queue_are_adopted_and_not_sent_again(
    client: Client, bystander: Callable[..., Bystander], tmp_path: Path
) -> None:
    service = bystander(batch_size=10, max_queue_size=1_000)
    # Rows of three shards share the jobs.
    write_rows(tmp_path / "in.jsonl", 120)
    # The process is killed while its rows wait: nobody serves them.
    code = (
        "import sys; from millstream.client import Client\n"
        "Client(sys.argv[1]).bulk(*sys.argv[2:5], column='text', id_column='key', shard_rows=50)"
    )
    words = [client._calls.connection.url, service.name, str(tmp_path / "in.jsonl"), str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", code, *words])
    try:
        eventually(lambda: service.queue.depth() == 12, within_s=LONG_S)
    finally:
        process.kill()
        process.wait()
    service.answer_all(service.claim(12))

    with serving(service) as depths:
        run(client, service.name, tmp_path / "in.jsonl", tmp_path / "out")

    assert max(depths) == 0
    assert len(results_of(tmp_path / "out")) == 120


def test_shards_that_were_written_but_not_noted_are_not_computed_again(
    client: Client, echo: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "in.jsonl", 400, bad=20)

    def count_jobs() -> int:
        return connection.client.xinfo_stream(ServiceKeys(echo).stream("batch"))["entries-added"]  # type: ignore[arg-type,no-any-return]

    def end(*_: object) -> None:
        raise Ended

    run(client, echo, tmp_path / "in.jsonl", tmp_path / "first")
    before = count_jobs()
    run(client, echo, tmp_path / "in.jsonl", tmp_path / "whole")
    undisturbed = count_jobs() - before
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "add", end)
        with pytest.raises(Ended):
            run(client, echo, tmp_path / "in.jsonl", tmp_path / "out")
    parts = len(list((tmp_path / "out").glob("part-*")))

    run(client, echo, tmp_path / "in.jsonl", tmp_path / "out")

    assert parts == 4
    check(tmp_path / "out", 400, 20)
    assert count_jobs() == before + 2 * undisturbed


def test_progress_is_told_while_a_call_is_computed(
    client: Client, bystander: Callable[..., Bystander], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "LOOK_S", 0.01)
    service, seen = bystander(batch_size=10, max_queue_size=1_000), list[BulkProgress]()
    write_rows(tmp_path / "in.jsonl", 103, bad=3)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run, client, service.name, tmp_path / "in.jsonl", tmp_path / "out", progress=seen.append)
        eventually(lambda: service.queue.depth() == 10, within_s=LONG_S)
        claims = service.claim(10)
        service.answer_all(claims[:5])
        eventually(lambda: seen[-1].rows == 53, within_s=LONG_S)
        service.answer_all(claims[5:])
        assert done.result(LONG_S).rows == 103

    assert [each.rows for each in seen] == sorted(each.rows for each in seen)
    assert [each.share for each in seen] == sorted(each.share for each in seen)
    assert {0 < each.share < 1 for each in seen if each.rows == 53} == {True}


def test_a_bulk_run_takes_a_quarter_of_the_queue_at_most(
    client: Client, bystander: Callable[..., Bystander], tmp_path: Path
) -> None:
    service = bystander(batch_size=1, max_queue_size=40)
    write_rows(tmp_path / "in.jsonl", 100)

    with serving(service) as depths:
        run(client, service.name, tmp_path / "in.jsonl", tmp_path / "out")

    assert max(depths) <= 12
    check(tmp_path / "out", 100, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truncate": "end"}, r"options\.truncate was None and is 'end'"),
        ({"shard_rows": 25}, "shard_rows was 50 and is 25"),
        ({"format": "csv"}, "format was 'jsonl' and is 'csv'"),
        ({"column": "key"}, "column was 'text' and is 'key'"),
    ],
)
def test_another_option_is_refused_and_named(
    client: Client, echo: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_rows(tmp_path / "in.jsonl", 200)
    with pytest.raises(Ended):
        run(client, echo, tmp_path / "in.jsonl", tmp_path / "out", progress=end_after(2))

    with pytest.raises(InvalidRequest, match=message):
        run(client, echo, tmp_path / "in.jsonl", tmp_path / "out", **change)


def test_a_changed_input_is_refused_and_a_touched_one_is_not(client: Client, echo: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_rows(source, 200)
    with pytest.raises(Ended):
        run(client, echo, source, tmp_path / "out", progress=end_after(2))
    content = source.read_text()

    source.write_text(content.replace("row 60 ", "ROW 60 "))
    with pytest.raises(InvalidRequest, match="the input differs in rows 50 to 99"):
        run(client, echo, source, tmp_path / "out")
    source.write_text(content + "\n")
    with pytest.raises(InvalidRequest, match=r"input\.size"):
        run(client, echo, source, tmp_path / "out")
    source.write_text(content)
    os.utime(source, ns=(1, 1))
    run(client, echo, source, tmp_path / "out")

    check(tmp_path / "out", 200, 0)


def test_another_model_is_refused(
    client: Client, connection: Connection, bystander: Callable[..., Bystander], tmp_path: Path
) -> None:
    service = bystander(batch_size=10)
    write_rows(tmp_path / "in.jsonl", 200)
    with serving(service), pytest.raises(Ended):
        run(client, service.name, tmp_path / "in.jsonl", tmp_path / "out", progress=end_after(2))
    Registry(connection).push([echo_spec(service.name, forward_s=1.0)], replace=True)

    with Client(client._calls.connection.url) as later, pytest.raises(InvalidRequest, match=r"model\.model_name was"):
        run(later, service.name, tmp_path / "in.jsonl", tmp_path / "out")


@pytest.mark.parametrize(("function", "moments"), [("fsync", 13), ("replace", 3), ("ftruncate", 1)])
def test_a_disk_that_is_full_at_any_moment_ends_the_run_and_the_next_one_goes_on(
    client: Client, echo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, moments: int
) -> None:
    write_rows(tmp_path / "in.jsonl", 500, bad=20)
    real, called = getattr(os, function), 0

    def fill_up_at(moment: int) -> Callable[..., object]:
        def call(*words: Any) -> object:
            nonlocal called
            called += 1
            if called == moment:
                raise OSError(28, "No space left on device")
            return real(*words)

        return call

    # Each shard is synced up to four times: its errors, its part, the folder and the manifest.
    for moment in range(1, moments + 1):
        output, called = tmp_path / f"out{moment}", 0
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fill_up_at(moment))
            with pytest.raises(MillstreamError, match=r"No space left on device.*same command"):
                run(client, echo, tmp_path / "in.jsonl", output)

        run(client, echo, tmp_path / "in.jsonl", output)

        check(output, 500, 20)


def test_vectors_come_as_arrays(client: Client, echo: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a\nb\nc\n")

    with pytest.raises(InvalidRequest, match="npy takes dense vectors"):
        client.bulk(echo, tmp_path / "in.txt", tmp_path / "out", format="npy")


def test_parts_of_an_input_are_done_by_runs_of_their_own(client: Client, echo: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 1_000, bad=20)
    for number in (1, 2, 3):
        output = tmp_path / f"out{number}"
        with pytest.raises(Ended):
            run(client, echo, tmp_path / "in.jsonl", output, part=f"{number}/3", progress=end_after(2))
        done = run(client, echo, tmp_path / "in.jsonl", output, part=f"{number}/3")
        assert done.rows == (350, 350, 300)[number - 1]
        assert done.share == 1.0

    parts = sorted((part for part in tmp_path.glob("out*/part-*")), key=lambda part: part.name)
    rows = [json.loads(line)["row"] for part in parts for line in part.read_text().splitlines()]
    errors = [each["row"] for number in (1, 2, 3) for each in errors_of(tmp_path / f"out{number}")]
    assert rows == sorted(rows)
    assert sorted(rows + errors) == list(range(1_000))
    with pytest.raises(InvalidRequest, match="part was '1/3' and is '2/3'"):
        run(client, echo, tmp_path / "in.jsonl", tmp_path / "out1", part="2/3")
    with pytest.raises(InvalidRequest, match="not a part such as 2/8"):
        run(client, echo, tmp_path / "in.jsonl", tmp_path / "new", part="4/3")


def test_an_empty_input_has_no_results(client: Client, echo: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").touch()

    progress = client.bulk(echo, tmp_path / "in.txt", tmp_path / "out")

    assert (progress.rows, results_of(tmp_path / "out"), errors_of(tmp_path / "out")) == (0, [], [])


def test_nothing_is_written_for_a_service_that_is_unknown(client: Client, tmp_path: Path) -> None:
    (tmp_path / "in.txt").touch()

    with pytest.raises(UnknownService):
        client.bulk("nothing-here", tmp_path / "in.txt", tmp_path / "out")

    assert not (tmp_path / "out").exists()
