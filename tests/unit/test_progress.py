"""What a worker leaves behind for its supervisor is whole, however the worker ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.queue.streams import MAX_JOBS_PER_CALL
from millstream.worker.lane import MOST_ROWS
from millstream.worker.supervision.progress import MOST_ENTRIES, SIZE, Progress, Snapshot, Stage, State, Track

CHILD = """
import sys, time
from millstream.worker.supervision.progress import Progress, Stage, State
progress = Progress(int(sys.argv[1]))
progress.enter(State.READY)
progress.runner.start(["0:before"], Stage.RUN)
progress.runner.stop()
progress.runner.start(["1:10-0", "2:20-5"], Stage.RUN)
progress.claimer.start(["3:1-1"], Stage.CLAIM)
progress.claimer.move(Stage.PREPARE)
print("running", flush=True)
time.sleep(600)
"""

FLIPPING_CHILD = """
import sys
from millstream.worker.supervision.progress import Progress, Stage
progress = Progress(int(sys.argv[1]))
short, long = ["1:1-1"], [f"2:{n}-0" for n in range(1500)]
progress.runner.start(short, Stage.RUN)
print("running", flush=True)
while True:
    progress.runner.start(long, Stage.RUN)
    progress.runner.start(short, Stage.RUN)
"""

SHORT, LONG = ["1:1-1"], [f"2:{n}-0" for n in range(1500)]


@pytest.fixture
def progress() -> Iterator[Progress]:
    page = Progress.create()
    yield page
    page.close()


def run(progress: Progress, entries: list[str]) -> None:
    progress.runner.start(entries, Stage.RUN)


def started(progress: Progress, code: str) -> subprocess.Popen[bytes]:
    """Run `code` in a child that writes the page, until it has begun."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(progress.fd)], stdout=subprocess.PIPE, pass_fds=[progress.fd]
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"running\n"
    return child


def kill(child: subprocess.Popen[bytes]) -> None:
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def killed(progress: Progress, code: str, after_s: float = 0.0) -> None:
    child = started(progress, code)
    threading.Event().wait(after_s)
    kill(child)


def in_hand(progress: Progress) -> list[tuple[Stage, list[str]]]:
    return [(snapshot.stage, snapshot.entries) for snapshot in progress.snapshots()]


def test_a_new_page_is_of_a_worker_that_starts_and_has_nothing_in_hand(progress: Progress) -> None:
    assert progress.state == State.STARTING
    assert (progress.running(), progress.snapshots(), progress.is_stuck) == ([], [], False)


def test_what_each_thread_had_in_hand_is_known_after_the_workers_kill_9(progress: Progress) -> None:
    killed(progress, CHILD)

    assert in_hand(progress) == [(Stage.PREPARE, ["3:1-1"]), (Stage.RUN, ["1:10-0", "2:20-5"])]
    assert progress.running() == ["1:10-0", "2:20-5"]
    assert progress.state == State.READY
    assert 0 < progress.runner.idle_s < 60


@pytest.mark.parametrize("after_s", [0.001, 0.002, 0.003, 0.004])
def test_a_half_written_list_is_never_left_behind(progress: Progress, after_s: float) -> None:
    killed(progress, FLIPPING_CHILD, after_s)

    assert progress.running() in (SHORT, LONG)


def test_a_half_written_list_is_never_seen_while_the_worker_goes_on(progress: Progress) -> None:
    child = started(progress, FLIPPING_CHILD)
    seen = [tuple(progress.running()) for _ in range(5_000)]
    kill(child)

    assert set(seen) <= {tuple(SHORT), tuple(LONG)}


def test_a_list_that_is_overwritten_while_it_is_read_is_read_again(
    progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(progress, ["1:1-1", "1:2-2"])
    begin = iter([["2:2-2"], ["3:3-3"]])

    class Overtaken:
        """The page, of which two further lists are begun just before the first one is copied."""

        def __getitem__(self, at: slice) -> bytes:
            for entries in begin:
                writer.start(entries, Stage.RUN)
            return whole[at]

    whole, writer = progress._map, Progress(progress.fd).runner
    monkeypatch.setattr(progress.runner, "_page", Overtaken())

    assert progress.running() == ["3:3-3"]


def test_a_write_that_was_cut_off_leaves_the_list_before_it(progress: Progress) -> None:
    run(progress, ["1:1-1"])
    page = os.pread(progress.fd, 4096, 0)
    run(progress, ["2:2-2", "3:3-3"])

    # The list was written, the header was not: what kill -9 between the two leaves.
    os.pwrite(progress.fd, page, 0)

    assert progress.running() == ["1:1-1"]


def test_the_threads_lists_do_not_touch_each_other(progress: Progress) -> None:
    entries = {track: [f"{track}:{2**64 - 1}-{n}" for n in range(5_000)] for track in (1, 2, 3)}
    progress.claimer.start(entries[1], Stage.CLAIM)
    run(progress, entries[2])
    progress.settler.start(entries[3], Stage.SETTLE)
    progress.enter(State.DRAINING)
    progress.claimer.move(Stage.PREPARE)

    whole = in_hand(progress)
    progress.runner.stop()

    assert whole == [(Stage.PREPARE, entries[1]), (Stage.RUN, entries[2]), (Stage.SETTLE, entries[3])]
    assert in_hand(progress) == [whole[0], whole[2]]
    assert progress.state == State.DRAINING


@given(st.lists(st.sampled_from(["start", "move", "point", "lap", "stop"]), max_size=30))
def test_a_track_says_what_its_thread_did_last(does: list[str]) -> None:
    track = Progress.alone().claimer
    expected: tuple[Stage, list[str]] | None = None
    entries: list[str] = []
    for number, each in enumerate(does):
        if each == "start":
            entries = [f"1:{number}-{n}" for n in range(number)]
            expected = (Stage.CLAIM, entries)
            track.start(entries, Stage.CLAIM)
        elif each == "move" and expected:
            expected = (Stage.PREPARE, entries)
            track.move(Stage.PREPARE)
        elif each == "point" and expected and entries:
            expected = (expected[0], entries[len(entries) // 2 :][:1])
            track.point(len(entries) // 2 + 1)
        elif each == "lap":
            track.lap()
        elif each == "stop":
            expected = None
            track.stop()

        snapshot = track.snapshot()
        assert (snapshot and (snapshot.stage, snapshot.entries)) == expected


def test_the_page_has_room_for_the_longest_names_of_all_that_a_forward_or_a_claim_can_hold(progress: Progress) -> None:
    """A window holds back at MOST_ROWS; one claim more may come on top, and one job that a sleeper woke with."""
    entries = [f"3:{2**64 - 1}-{2**64 - 1 - n}" for n in range(MOST_ROWS + MAX_JOBS_PER_CALL + 1)]
    assert len(entries) <= MOST_ENTRIES

    for track in (progress.claimer, progress.runner, progress.settler):
        track.start(entries, Stage.RUN)

    assert all(snapshot.entries == entries for snapshot in progress.snapshots())
    assert len(progress.snapshots()) == 3


def test_more_than_the_page_holds_is_refused_and_never_cut(progress: Progress) -> None:
    run(progress, ["1:1-1"])

    with pytest.raises(ValueError, match="the page holds"):
        run(progress, [f"3:{2**64 - 1}-{2**64 - 1 - n}" for n in range(MOST_ENTRIES + 1)])

    assert progress.running() == ["1:1-1"]


def test_a_stage_that_begins_after_idleness_has_not_lasted_for_long(
    progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor may look between a child's writes: the stamp of the begin, and the word that says what began."""
    progress.stall_s = 10.0
    run(progress, ["1:1-1"])
    progress.runner.stop()
    long_after = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: long_after)
    writer = Progress(progress.fd).runner

    class Beginning:
        """The header's words, of which a stage begins just before one is read."""

        def __getitem__(self, at: int) -> int:
            writer.start(["2:2-2"], Stage.RUN)
            return int(words[at])

    words = progress._words
    monkeypatch.setattr(progress.runner, "_words", Beginning())

    assert progress.runner.idle_s == 0.0
    assert not progress.is_stuck


@pytest.mark.parametrize("which", ["claimer", "runner", "settler"])
def test_any_stage_is_stuck_once_it_makes_no_progress_for_longer_than_it_may(
    progress: Progress, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    track: Track = getattr(progress, which)
    progress.stall_s = 10.0
    now = time.monotonic()
    stuck: list[list[Snapshot]] = []

    def after(seconds: float) -> None:
        nonlocal now
        now += seconds
        stuck.append(progress.stuck())

    monkeypatch.setattr(time, "monotonic", lambda: now)
    track.start(["1:1-1"], Stage.PREPARE)
    after(9.0)
    after(2.0)
    track.lap()
    after(9.0)
    track.move(Stage.RUN)
    after(9.0)
    track.stop()
    after(11.0)

    assert stuck == [[], [(Stage.PREPARE, ["1:1-1"], 11.0)], [], [], []]


def test_a_thread_that_goes_on_is_not_blamed_for_one_that_is_stuck(
    progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress.stall_s = 10.0
    progress.claimer.start(["1:1-1"], Stage.PREPARE)
    run(progress, ["2:2-2"])
    later = time.monotonic() + 11.0
    monkeypatch.setattr(time, "monotonic", lambda: later)
    progress.runner.lap()

    assert [snapshot.entries for snapshot in progress.stuck()] == [["1:1-1"]]


@pytest.mark.parametrize("reason", ["", "CUDA error: the device is gone", "ü" * 5_000])
def test_last_words_are_kept_as_far_as_they_fit(progress: Progress, reason: str) -> None:
    run(progress, ["1:1-1"])
    progress.set_reason(reason)

    assert reason.startswith(progress.reason.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert bool(progress.reason) == bool(reason)
    assert progress.running() == ["1:1-1"]


def test_only_a_forward_that_ended_is_work_done(progress: Progress) -> None:
    worked = [progress.worked]
    progress.claimer.start(["1:1-1"], Stage.PREPARE)
    progress.claimer.stop()
    worked.append(progress.worked)
    run(progress, ["1:1-1"])
    worked.append(progress.worked)
    progress.runner.stop()
    worked.append(progress.worked)
    run(progress, ["1:2-1"])
    worked.append(progress.worked)

    assert worked == [False, False, False, True, True]


def test_the_page_has_no_name_to_be_left_behind_and_takes_memory_only_where_it_was_written(progress: Progress) -> None:
    run(progress, ["1:1-1"])

    about = os.fstat(progress.fd)
    assert about.st_nlink == 0
    assert about.st_blocks * 512 < SIZE / 100
