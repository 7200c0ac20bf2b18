"""`millstream bulk` as users run it: killed, interrupted, out of disk space, without its server; and it goes on."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.cli_support import COMMAND, Shell, environment
from e2e.sites import Site, echo, site_of
from e2e.terminal import CTRL_C, Terminal
from support import eventually

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.server.embedded import EmbeddedServer
from millstream.client.bulk.manifest import read_manifest

LONG = os.environ.get("MILLSTREAM_LONG") == "1"
KILLS, ROWS, BAD, SHARD_ROWS, BATCH = 20 if LONG else 2, 20_000 if LONG else 4_000, 20, 200, 20
SEED = random.SystemRandom().randrange(2**32)


@pytest.fixture(scope="module")
def site(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """An echo service with one worker, which does about 4,000 rows a second."""
    home = tmp_path_factory.mktemp("bulk")
    with site_of(url, echo("sleep:0.005", batch_size=BATCH, max_batch_tokens=100_000), home) as opened:
        opened.start_host(1)
        opened.await_workers(1)
        yield opened


@pytest.fixture
def shell(tmp_path: Path, url: str) -> Shell:
    return Shell(tmp_path, url)


def write_rows(home: Path, count: int = ROWS) -> None:
    """Rows with ids, every second one equal to the one before; every tenth is bad, until there are BAD of them."""
    with (home / "in.jsonl").open("w") as file:
        for row in range(count):
            text: Any = 5 if row % 10 == 3 and row // 10 < BAD else f"row {row // 2} " + "x" * (row // 2 * 7 % 50)
            file.write(json.dumps({"key": row, "text": text}) + "\n")


def words(site: Site) -> list[str]:
    given = ["bulk", "run", "in.jsonl", "-o", "done", "--service", site.spec.name, "--shard-rows", str(SHARD_ROWS)]
    return [*given, "--column", "text", "--id", "key", "--window", str(4 * SHARD_ROWS)]


def check(home: Path, count: int = ROWS) -> None:
    parts = sorted((home / "done").glob("part-*.jsonl"))
    results = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    errors = [json.loads(line) for line in (home / "done" / "errors.jsonl").read_text().splitlines()]
    bad = [10 * at + 3 for at in range(BAD)]
    assert [each["row"] for each in errors] == [each["id"] for each in errors] == bad
    good = [row for row in range(count) if row not in set(bad)]
    assert [each["row"] for each in results] == [each["id"] for each in results] == good
    assert all(each["result"].startswith(f"row {each['row'] // 2} ") for each in results)


def finished(home: Path) -> dict[str, int]:
    """The parts that the manifest notes, with the time at which each was written."""
    if not (home / "done" / "manifest.jsonl").exists():
        return {}
    record, _ = read_manifest(home / "done")
    return {note.file: (home / "done" / note.file).stat().st_mtime_ns for note in record.notes}


def await_shards(home: Path, count: int) -> None:
    eventually(lambda: len(finished(home)) >= count, within_s=60.0)


def test_a_run_that_is_killed_at_any_moment_goes_on_and_does_no_finished_shard_again(site: Site, shell: Shell) -> None:
    write_rows(shell.home)
    chance = random.Random(SEED)
    added = "entries-added"
    stream = ServiceKeys(site.spec.name).stream("batch")  # type: ignore[arg-type]
    jobs_before = site.connection.client.xinfo_stream(stream)[added]

    for kill in range(KILLS):
        before = finished(shell.home)
        goal = len(before) + chance.randint(1, ROWS // SHARD_ROWS // (KILLS + 1))
        with shell.background(*words(site)) as running:
            await_shards(shell.home, goal)
            running.process.kill()
        after = finished(shell.home)
        assert {name: after[name] for name in before} == before, (SEED, kill)
    before = finished(shell.home)
    ended = shell.run(*words(site))

    assert ended.code == 9, (SEED, ended)
    after = finished(shell.home)
    assert {name: after[name] for name in before} == before, SEED
    check(shell.home)
    jobs = site.connection.client.xinfo_stream(stream)[added] - jobs_before
    assert jobs == (ROWS - BAD + BATCH - 1) // BATCH, (SEED, "rows that were in the queue were sent again")


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(site: Site, shell: Shell) -> None:
    # So many that the run is not over before the keys are pressed.
    count = 3 * ROWS
    write_rows(shell.home, count)

    with Terminal(shell, words(site)) as terminal:
        await_shards(shell.home, 2)
        terminal.shows("rows/s")
        terminal.press(CTRL_C)
        assert terminal.wait() == 130
        shown = terminal.shown

    assert "Traceback" not in shown
    assert f"To go on: millstream {' '.join(words(site))}" in shown
    for line in shown.replace("\x1b[K", "").replace("\r", "\n").splitlines():
        if "rows/s" in line:
            assert len(line) < 80
    assert shell.run("bulk", "status", "done").out.decode().startswith("state    stopped\n")
    assert shell.run(*words(site)).code == 9
    check(shell.home, count)


def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on(site: Site, shell: Shell) -> None:
    write_rows(shell.home, 1_000)
    # Shards of the later rows are longer than the first ones, and the disk takes no file of that size.
    limit = 8_200
    done = subprocess.run(
        [COMMAND, *words(site)],
        cwd=shell.home,
        env=environment(shell.home, shell.url),
        capture_output=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )

    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr.decode()
    assert "cannot be written: File too large" in done.stderr.decode().splitlines()[-1]
    assert shell.run(*words(site)).code == 9
    check(shell.home, 1_000)


def test_a_run_outlives_the_end_of_its_server(site: Site, shell: Shell, server: EmbeddedServer) -> None:
    write_rows(shell.home)

    with shell.background(*words(site)) as running:
        await_shards(shell.home, 2)
        os.kill(server.pid, signal.SIGKILL)
        server.restart()
        eventually(lambda: running.process.poll() is not None, within_s=90.0)

    assert running.process.returncode == 9, running.err
    check(shell.home)


def test_failed_rows_are_tried_again_and_the_status_tells_that_some_failed(site: Site, shell: Shell) -> None:
    write_rows(shell.home, 500)
    assert shell.run(*words(site)).code == 9

    ended = shell.run("bulk", "retry-failed", "done")

    assert ended.code == 9, ended
    assert f"{BAD} rows tried again, {BAD} failed: done" in ended.err
    check(shell.home, 500)


def test_wrong_usage_is_one_line(site: Site, shell: Shell) -> None:
    (shell.home / "in.txt").write_text("a\n")
    run = ["bulk", "run", "in.txt", "--service", site.spec.name]

    assert "no columns" in shell.run(*run, "-o", "out", "--column", "text").line(2)
    assert "is not NAME=VALUE" in shell.run(*run, "-o", "out3", "--option", "format=1").err
    assert "cannot be read" in shell.run("bulk", "status", "nothing").line(2)


def test_standard_input_is_copied_and_a_later_run_needs_it_no_more(site: Site, shell: Shell) -> None:
    run = ["bulk", "run", "-", "-o", "done", "--service", site.spec.name, "--input-format", "text", "--format", "csv"]

    assert shell.run(*run, stdin=b"one\ntwo\n").code == 0
    assert shell.run(*run).code == 0

    part = (shell.home / "done" / "part-000000.csv").read_text()
    assert part == "row,id,result\n0,,one\n1,,two\n"
