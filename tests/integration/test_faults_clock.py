"""A server whose wall clock steps, by an hour back or two ahead, really: a preloaded library moves what it is told."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from contracts.queue import draft
from integration.faults import SERVICE, Mill, frozen, let_pass, milling
from support import eventually

from millstream.broker.contract.errors import DeadlineExceeded, MillstreamError, RateLimited
from millstream.broker.queue.lease import LEASE_S

HOUR_S = 3600


@dataclass(frozen=True)
class Clock:
    """`server` is a server binary whose clock this is."""

    server: Path
    file: Path

    def step(self, seconds: int) -> None:
        """From now on it is this far from the true time."""
        self.file.write_bytes(struct.pack("q", seconds * 1_000_000))


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.fail("no C compiler: apt install gcc libc6-dev")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.fixture
def clock(shim: Path, server_binary: Path, tmp_path: Path) -> Clock:
    wrapper, file = tmp_path / "server", tmp_path / "step"
    wrapper.write_text(f'#!/bin/sh\nCLOCK_STEP={file} LD_PRELOAD={shim} exec {server_binary} "$@"\n')
    wrapper.chmod(0o755)
    made = Clock(wrapper, file)
    made.step(0)
    return made


def now_s(mill: Mill) -> int:
    return mill.queue.now() // 1000


def test_calls_go_on_without_an_error_through_a_step_back(tmp_path: Path, clock: Clock) -> None:
    with milling(tmp_path, clock.server, workers=2, forward_s=0.02, batch_size=4) as mill:
        with mill.called() as callers:
            before = now_s(mill)
            clock.step(-HOUR_S)
            assert mill.most_attempts_until(callers, 200) == 0
            assert now_s(mill) < before - HOUR_S / 2

        mill.ran_once_each(callers.answered)


def test_a_step_ahead_ends_at_most_the_calls_under_way(tmp_path: Path, clock: Clock) -> None:
    with milling(tmp_path, clock.server, workers=2, forward_s=0.02, batch_size=4, total_timeout=10) as mill:
        with mill.calling() as callers:
            before = now_s(mill)
            clock.step(2 * HOUR_S)
            assert mill.most_attempts_until(callers, 200) == 0
            assert now_s(mill) > before + HOUR_S

        assert len(callers.errors) <= callers.size
        assert {type(error) for error in callers.errors} <= {DeadlineExceeded}
        assert callers.wrong == []
        eventually(lambda: not mill.watch.depth())
        assert mill.supervisor.restarts == 0


@pytest.mark.parametrize("step_s", [-HOUR_S, 2 * HOUR_S])
def test_what_a_lost_worker_held_at_a_step_is_given_back_soon_after(tmp_path: Path, clock: Clock, step_s: int) -> None:
    with milling(tmp_path, clock.server) as mill:
        mill.beaten()
        with frozen(*mill.supervisor.pids):
            # Twice: by then the server has read what they sent just before.
            eventually(lambda: not any(mill.connection.client.info("clients")["blocked_clients"] for _ in range(2)))
            mill.queue.hold("lost", draft())

        clock.step(step_s)

        eventually(lambda: not mill.queue.held_by("lost"), within_s=30.0)
        eventually(mill.queue.replies)
        eventually(lambda: mill.queue.lease.live_workers() == 1)
        eventually(lambda: [worker.state for worker in mill.queue.view().workers] == ["ready"])


@pytest.mark.parametrize(("step_s", "living"), [(-HOUR_S, 0), (-LEASE_S // 2, 1)])
def test_all_agree_on_who_lives_before_the_first_beat_after_a_step_back(
    tmp_path: Path, clock: Clock, step_s: int, living: int
) -> None:
    with milling(tmp_path, clock.server) as mill:
        mill.beaten()
        with frozen(*mill.supervisor.pids):
            before = mill.queue.now()
            clock.step(int(step_s))
            # The server may look at its clock a moment later.
            eventually(lambda: mill.queue.now() < before)

            assert mill.queue.lease.live_workers() == living
            assert len(mill.queue.view().workers) == living
            # This beat counts itself.
            assert mill.queue.lease.beat("w2", {}, []).live_workers == living + 1
            assert len(mill.queue.view().workers) == living + 1
        mill.queue.lease.release("w2", gone=True)


@pytest.mark.parametrize("step_s", [-HOUR_S, 2 * HOUR_S])
def test_the_rate_limit_neither_opens_nor_shuts_with_a_step(tmp_path: Path, clock: Clock, step_s: int) -> None:
    with milling(tmp_path, clock.server, rate_limit={"requests": 2, "burst": 10}) as mill:
        assert admitted(mill, 20) >= 10

        clock.step(step_s)

        # At most what the bucket holds, and what two seconds refill.
        assert admitted(mill, 20) <= (0 if step_s < 0 else 10) + 4
        let_pass(1.5)
        assert admitted(mill, 20) > 0
        let_pass(1.5)
        assert 0 < admitted(mill, 20) <= 10


def admitted(mill: Mill, calls: int) -> int:
    """How many of so many impatient calls were not refused."""
    return sum(not isinstance(outcome_of(mill), RateLimited) for _ in range(calls))


def outcome_of(mill: Mill) -> object:
    try:
        return mill.client.submit(SERVICE, ["a"], wait=False).result()
    except MillstreamError as error:
        return error


def test_replies_are_read_where_their_stream_begins_again_with_smaller_ids(tmp_path: Path, clock: Clock) -> None:
    with milling(tmp_path, clock.server) as mill:
        mill.client.submit(SERVICE, ["before"]).result()
        (stream,) = mill.connection.client.scan_iter("*:reply:*")
        (newest,) = (int(mill.connection.client.xinfo_stream(stream)["last-generated-id"].split(b"-")[0]),)

        clock.step(-HOUR_S)
        mill.connection.client.delete(stream)

        assert mill.client.submit(SERVICE, ["after"]).result() == ["after"]
        again = int(mill.connection.client.xinfo_stream(stream)["last-generated-id"].split(b"-")[0])
        assert again < newest
