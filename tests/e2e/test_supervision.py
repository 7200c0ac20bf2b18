"""What becomes of workers that hang, die young, cannot start or are told to end, and of the jobs they held."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from e2e.ledger import Ledger
from e2e.sites import Site, custom, echo, site_of
from e2e.supervisors import beaten, said, supervising
from e2e.watch import freeze_with_work
from support import eventually

from millstream.broker.config.load import ModelSpec, ServiceSpec
from millstream.broker.contract.errors import WorkerLost
from millstream.broker.server.embedded import EmbeddedServer
from millstream.worker.supervision import supervisor as module
from millstream.worker.supervision.plan import Plan

pytestmark = pytest.mark.early

Open = Callable[[ServiceSpec], Site]

LONG = bool(os.environ.get("MILLSTREAM_LONG"))

AWAY_S = 3.0
TESTS = Path(__file__).parents[1]


@pytest.fixture
def opened(url: str, tmp_path: Path) -> Iterator[Open]:
    """Registers a service, without a worker."""
    with ExitStack() as ends:
        yield lambda spec: ends.enter_context(site_of(url, spec, tmp_path / spec.name))


@pytest.fixture
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 s after the first death; from the fifth on as always."""
    monkeypatch.setattr(module, "_FIRST_BACKOFF_S", 0.1)


# -- forwards that do not end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hang", "spin", "hold"] if LONG else ["hang", "hold"])
def test_a_forward_that_never_ends_is_ended_and_its_neighbours_are_answered(opened: Open, how: str) -> None:
    site = opened(echo(f"{how}:poison", batch_size=16, stall_timeout=2, max_attempts=2))
    texts = [f"neighbour {number}" for number in range(48)]
    texts[20] = "poison"

    host = site.start_host(1)
    site.await_workers(1)
    with site.ledger() as ledger:
        ids = ledger.send([[text] for text in texts])
        ledger.wait_for(ids)

    replies = [reply for job in ids for reply in ledger.replies[job]]
    assert [reply.values for reply in replies] == [None if text == "poison" else [text] for text in texts]
    assert isinstance(replies[20].error, WorkerLost)
    assert [letter[b"id"].decode() for letter in site.watch.dead_letters()] == [ids[20]]
    assert host.deaths() == 2
    assert site.watch.depth() == 0


def test_a_stuck_worker_and_its_successor_say_what_happens(opened: Open) -> None:
    site = opened(echo("hang:poison", stall_timeout=3, max_attempts=1))
    host = site.start_host(1)
    site.await_workers(1)
    (first,) = site.watch.live()

    with site.ledger() as ledger:
        ids = ledger.send([["poison"]])
        eventually(lambda: field(site, "running_ms")[0] > 500)
        growing = field(site, "running_ms")[0]
        eventually(lambda: field(site, "running_ms")[0] > growing + 500)
        assert field(site, "running") == [1]
        eventually(lambda: site.watch.workers() and first not in site.watch.workers(), within_s=30.0)
        ledger.wait_for(ids)

    (second,) = site.watch.workers().values()
    assert b"was killed by SIGKILL during run (no progress for 3." in second[b"past"]
    assert b"the stall_timeout is 3 s" in second[b"past"]
    assert field(site, "running") == [0]
    assert host.deaths() == 1


def test_forwards_within_the_stall_timeout_are_left_alone(opened: Open) -> None:
    site = opened(echo("sleep:0.4", batch_size=4, stall_timeout=2))
    host = site.start_host(1)
    site.await_workers(1)
    workers = site.watch.live()

    # Busy for longer than the stall timeout in all, then idle for longer, then busy again.
    with site.ledger() as ledger:
        ledger.wait_for(ledger.send([["a"]] * 32))
        beaten(site, 3)
        ledger.wait_for(ledger.send([["a"]]))

    assert site.watch.live() == workers
    assert host.deaths() == 0


def test_hooks_that_are_slow_in_all_but_not_each_are_left_alone(opened: Open) -> None:
    site = opened(custom("deadly:Deadly", batch_size=16, stall_timeout=2))

    with supervising(site.url, Plan(site.spec, 1, folder=str(TESTS))) as supervision, site.ledger() as ledger:
        ledger.wait_for(ledger.send([["slow in check"]] * 8))
        restarts = supervision.supervisor.restarts

    assert restarts == 0


def test_a_stuck_worker_without_a_supervisor_ends_itself(opened: Open) -> None:
    site = opened(echo("hang:poison", stall_timeout=2))
    host = site.start_host(1)
    site.await_workers(1)
    (worker,) = host.children

    with site.ledger() as ledger:
        ledger.send([["poison"]])
        eventually(lambda: field(site, "running") == [1])
        host.kill()
        eventually(lambda: not os.path.exists(f"/proc/{worker}/exe"), within_s=15.0)

    assert site.watch.attempts() == 1
    assert (len(site.watch.held("returned")), site.watch.workers()) == (1, {})


def test_a_drain_waits_for_no_stuck_worker(opened: Open) -> None:
    site = opened(echo("hang:poison", stall_timeout=2))
    with supervising(site.url, Plan(site.spec, 1), drain_s=60.0) as supervision, site.ledger() as ledger:
        supervision.ready(1)
        ledger.send([["poison"]])
        eventually(lambda: field(site, "running") == [1])

        began = time.monotonic()
        supervision.end()

    assert time.monotonic() - began < 10.0
    assert site.watch.attempts() == 1
    assert site.watch.workers() == {}


# -- workers that cannot start -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "why"),
    [
        *([("crash:word", "exited with status 1")] if LONG else []),
        ("sleep:long", "exited with status 1 (ValueError: could not convert string to float: 'long')"),
    ],
)
@pytest.mark.usefixtures("quick_backoff")
def test_a_crash_loop_is_told_slowed_down_and_disturbs_nobody(
    opened: Open, caplog: pytest.LogCaptureFixture, model: str, why: str
) -> None:
    good, bad = opened(echo("")), opened(echo(model))
    told = said(caplog, f"5 workers in a row died early, the last one {why}", logging.ERROR)

    with supervising(good.url, Plan(bad.spec, 1), Plan(good.spec, 1)) as supervision, good.ledger() as ledger:
        good.await_workers(1)
        worker = good.watch.live()

        def told_while_others_are_served() -> bool:
            ledger.wait_for(ledger.send([["a"]]), within_s=5.0)
            return bool(told())

        eventually(told_while_others_are_served, within_s=60.0)
        assert good.watch.live() == worker
        assert supervision.supervisor.restarts == 5
        assert len(supervision.pids) == 1

    pauses = [message.rpartition("; the next starts in ")[2] for message in said(caplog, why)()]
    assert pauses == ["0.1 s", "0.2 s", "0.4 s", "0.8 s", "30 s"]
    assert len(told()) == 1
    assert bad.spec.name in told()[0]
    assert told()[0].endswith("retrying every 30 s")


def test_what_would_fail_again_is_said_once_and_not_tried_again(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = opened(echo("")), opened(echo("raise:word"))

    with supervising(good.url, Plan(bad.spec, 2), Plan(good.spec, 1)) as supervision, good.ledger() as ledger:
        good.await_workers(1)
        eventually(lambda: len(supervision.pids) == 1, within_s=30.0)
        ledger.wait_for(ledger.send([["a"]]))

    (message,) = said(caplog, bad.spec.name, logging.ERROR)()
    assert "the model fails in its warm-up" in message
    assert supervision.supervisor.restarts == 0
    assert supervision.refused is None


@pytest.mark.parametrize("reason", ["fails", "is not there"])
def test_a_supervisor_without_any_worker_that_can_start_ends(
    opened: Open, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    site = opened(echo("raise:word"))
    spec = {
        "fails": site.spec,
        "is not there": opened(custom("no_such_module:Nothing")).spec,
    }[reason]

    with supervising(site.url, Plan(spec, 1)) as supervision:
        eventually(lambda: not supervision.is_alive(), within_s=90.0)

    assert supervision.refused
    assert len(said(caplog, spec.name, logging.ERROR)()) == 1


# -- workers that are told to end, or killed -----------------------------------------------------------------------


def test_a_worker_that_is_told_to_end_drains_and_is_replaced(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    site = opened(echo("sleep:0.02", batch_size=8))

    with supervising(site.url, Plan(site.spec, 2)), site.ledger() as ledger:
        site.await_workers(2)
        before = site.watch.live()
        victim, pid = next(iter(before.items()))
        ids = ledger.send([[f"text {number}"] for number in range(1500)])
        eventually(lambda: site.watch.held(victim) and ledger.answered > 100)
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: victim not in site.watch.live())
        site.await_workers(2)
        pasts = [fields[b"past"] for name, fields in site.watch.workers().items() if name not in before]
        ledger.wait_for(ids)

    assert pasts == [b"drained"]
    assert ledger.answered_more_than_once() == []
    assert said(caplog, "given back")() == []
    assert site.watch.depth() == 0


def test_what_a_worker_held_that_died_while_the_server_was_away_is_given_back_afterwards(
    opened: Open, server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    site = opened(echo("sleep:0.05", batch_size=4))

    with supervising(site.url, Plan(site.spec, 2)) as supervision, site.ledger() as ledger:
        site.await_workers(2)
        ids = ledger.send([[f"text {number}"] for number in range(200)])
        victim, pid = next(iter(site.watch.live().items()))
        freeze_with_work(site.watch, {victim: pid})
        os.kill(server.pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: supervision.supervisor.restarts == 1)
        server.restart()
        ledger.wait_for(ids)

    assert len(said(caplog, "given back")()) == 1
    assert ledger.answered_more_than_once() == []
    assert site.watch.depth() == 0


@pytest.mark.parametrize("busy", [True, False] if LONG else [True], ids=lambda busy: "busy" if busy else "idle")
@pytest.mark.parametrize("how", ["frozen", "restarted"])
def test_nobody_dies_and_nothing_runs_twice_while_the_server_is_away(
    opened: Open, server: EmbeddedServer, busy: bool, how: str
) -> None:
    site = opened(echo("sleep:0.05", batch_size=4))

    with supervising(site.url, Plan(site.spec, 2)) as supervision, site.ledger() as ledger:
        site.await_workers(2)
        workers = site.watch.live()
        texts = [[f"text {number}"] for number in range(400)]
        ids = ledger.send(texts) if busy else []
        if busy:
            eventually(lambda: ledger.answered > 20)
        away(server, how)
        ids += ledger.send([["afterwards"]])
        attempts = attempts_until_answered(site, ledger, ids)
        beaten(site, 2)
        assert site.watch.live() == workers
        assert sum(site.watch.counted("rows").values()) == len(ids)

    assert supervision.supervisor.restarts == 0
    assert max(attempts) == 0
    assert ledger.answered_more_than_once() == []
    assert site.watch.depth() == 0


def test_a_drain_while_the_server_is_away_ends_in_its_time(opened: Open, server: EmbeddedServer) -> None:
    site = opened(echo("sleep:0.05", batch_size=4))

    with supervising(site.url, Plan(site.spec, 2), drain_s=3.0) as supervision, site.ledger() as ledger:
        site.await_workers(2)
        ids = ledger.send([[f"text {number}"] for number in range(400)])
        eventually(lambda: ledger.answered > 20)
        os.kill(server.pid, signal.SIGKILL)
        began = time.monotonic()
        supervision.end()
        took = time.monotonic() - began
        server.restart()
        with supervising(site.url, Plan(site.spec, 2)):
            ledger.wait_for(ids)

    assert took < 8.0
    assert ledger.answered_more_than_once() == []


def test_workers_outlive_a_full_server_and_one_that_starts_then_drains_it(opened: Open) -> None:
    site = opened(echo("sleep:0.05", batch_size=4))

    with supervising(site.url, Plan(site.spec, 1)) as supervision, site.ledger() as ledger, ExitStack() as ends:
        site.await_workers(1)
        ids = ledger.send([[f"text {number}"] for number in range(200)])
        site.connection.client.config_set("maxmemory", 1)
        ends.callback(site.connection.client.config_set, "maxmemory", 0)
        beaten(site, 3)
        (pid,) = site.watch.live().values()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: pid not in site.watch.live().values())
        site.await_workers(1)
        ledger.wait_for(ids)
        assert supervision.supervisor.restarts == 1

    assert ledger.answered_more_than_once() == []


# -- what each worker is given -------------------------------------------------------------------------------------


def test_devices_are_taken_in_turn_and_cores_are_shared(opened: Open) -> None:
    spec = echo("").model_copy(update={"model": ModelSpec(type="echo", devices=("cpu:0", "cpu:1"))})
    site = opened(spec)

    with supervising(site.url, Plan(spec, 3)) as supervision:
        site.await_workers(3)
        devices = sorted(fields[b"device"] for fields in site.watch.workers().values())
        threads = [orders(pid)["threads"] for pid in supervision.pids]

    assert devices == [b"cpu:0", b"cpu:0", b"cpu:1"]
    assert threads == [max(1, len(os.sched_getaffinity(0)) // 3)] * 3


def field(site: Site, name: str) -> list[int]:
    """One number of each worker that beats."""
    return list(site.watch.counted(name).values()) or [0]


def attempts_until_answered(site: Site, ledger: Ledger, ids: list[str]) -> list[float]:
    """Wait for an answer to each; the most attempts that any pending job had behind it, time and again meanwhile."""
    seen: list[float] = []

    def answered() -> bool:
        seen.append(site.watch.attempts())
        return ledger.has_answered(len(ids))

    eventually(answered, within_s=90.0)
    return seen


def away(server: EmbeddedServer, how: str) -> None:
    """Take the server away, and back."""
    if how == "frozen":
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(AWAY_S)
        os.kill(server.pid, signal.SIGCONT)
    else:
        os.kill(server.pid, signal.SIGKILL)
        time.sleep(AWAY_S)
        server.restart()


def orders(pid: int) -> dict[str, object]:
    """What a worker was told."""
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    told: dict[str, object] = json.loads(arguments[arguments.index(b"millstream.worker.process") + 1])
    return told
