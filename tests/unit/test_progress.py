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

from millstream.worker.progress import SIZE, Progress, State

CHILD = """
import sys, time
from millstream.worker.progress import Progress, State
progress = Progress(int(sys.argv[1]))
progress.enter(State.READY)
progress.start(["0:before"])
progress.stop()
progress.start(["1:10-0", "2:20-5"])
print("running", flush=True)
time.sleep(600)
"""

FLIPPING_CHILD = """
import sys
from millstream.worker.progress import Progress
progress = Progress(int(sys.argv[1]))
short, long = ["1:1-1"], [f"2:{n}-0" for n in range(1500)]
progress.start(short)
print("running", flush=True)
while True:
    progress.start(long)
    progress.start(short)
"""


@pytest.fixture
def progress() -> Iterator[Progress]:
    page = Progress.create()
    yield page
    page.close()


def killed(progress: Progress, code: str, after_s: float = 0.0) -> None:
    """Run `code` in a child that writes the page; kill -9 it once it runs."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(progress.fd)], stdout=subprocess.PIPE, pass_fds=[progress.fd]
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"running\n"
    threading.Event().wait(after_s)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()


def test_a_new_page_is_of_a_worker_that_starts_and_runs_nothing(progress: Progress) -> None:
    assert progress.state == State.STARTING
    assert progress.running() == []


def test_what_ran_is_known_after_the_workers_kill_9(progress: Progress) -> None:
    killed(progress, CHILD)

    assert progress.running() == ["1:10-0", "2:20-5"]
    assert progress.state == State.READY
    assert 0 < time.monotonic() - progress.stamp() < 60


@pytest.mark.parametrize("after_s", [0.001, 0.002, 0.003, 0.004])
def test_a_half_written_list_is_never_seen(progress: Progress, after_s: float) -> None:
    killed(progress, FLIPPING_CHILD, after_s)

    assert progress.running() in (["1:1-1"], [f"2:{n}-0" for n in range(1500)])


def test_a_write_that_was_cut_off_leaves_the_list_before_it(progress: Progress) -> None:
    progress.start(["1:1-1"])
    page = os.pread(progress.fd, SIZE, 0)
    progress.start(["2:2-2", "3:3-3"])

    # The list was written, the header was not: what kill -9 between the two leaves.
    os.pwrite(progress.fd, page[:64], 0)

    assert progress.running() == ["1:1-1"]


def test_after_a_stop_nothing_runs_and_the_stamp_is_new(progress: Progress) -> None:
    progress.start(["1:1-1"])
    before = progress.stamp()

    progress.stop()

    assert progress.running() == []
    assert progress.stamp() >= before > 0


def test_the_state_survives_the_lists(progress: Progress) -> None:
    progress.enter(State.DRAINING)
    progress.start(["1:1-1"])
    progress.stop()

    assert progress.state == State.DRAINING


def test_a_list_too_long_for_the_page_is_cut_and_breaks_nothing(progress: Progress) -> None:
    entries = [f"2:{10**12 + n}-0" for n in range(10_000)]

    progress.start(entries)
    assert progress.running()[:1_000] == entries[:1_000]

    progress.start(["1:1-1"])
    assert progress.running() == ["1:1-1"]


def test_a_forward_that_begins_after_idleness_has_not_run_for_long(
    progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor may look between a child's two writes: the list of what runs, and the stamp of its begin."""
    progress.stall_s = 10.0
    progress.stop()
    long_after = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: long_after)
    stamp = progress.stamp

    def begin_meanwhile() -> float:
        before = stamp()
        progress.start(["1:1-1"])
        return before

    monkeypatch.setattr(progress, "stamp", begin_meanwhile)

    assert progress.running_s() == 0.0
    assert not progress.stuck


def test_a_forward_is_stuck_once_it_takes_longer_than_it_may(
    progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress.stall_s = 10.0
    progress.start(["1:1-1"])
    began = progress.stamp()

    stuck = []
    for seconds in (9.0, 11.0):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: began + seconds)
        stuck.append(progress.stuck)
    progress.lap()
    stuck.append(progress.stuck)

    assert stuck == [False, True, False]


@pytest.mark.parametrize("reason", ["", "CUDA error: the device is gone", "ü" * 5_000])
def test_last_words_are_kept_as_far_as_they_fit(progress: Progress, reason: str) -> None:
    progress.start(["1:1-1"])
    progress.last_words(reason)

    assert reason.startswith(progress.reason.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert bool(progress.reason) == bool(reason)
    assert progress.running() == ["1:1-1"]


def test_only_a_forward_that_ended_is_work_done(progress: Progress) -> None:
    before = progress.worked
    progress.start(["1:1-1"])
    during = progress.worked
    progress.stop()
    progress.start(["1:2-1"])

    assert (before, during, progress.worked) == (False, False, True)


def test_the_page_has_no_name_to_be_left_behind(progress: Progress) -> None:
    assert os.fstat(progress.fd).st_nlink == 0
