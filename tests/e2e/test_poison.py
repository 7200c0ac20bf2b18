"""A job that kills its worker, or makes the model raise, harms none of those that run beside it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from e2e.conftest import Supervised
from e2e.ledger import Ledger, Load
from e2e.sites import Site, custom, echo, site_of
from e2e.supervisors import said, supervising
from support import eventually

from millstream.broker.contract.errors import ModelFailed, WorkerLost
from millstream.broker.contract.job import Priority
from millstream.broker.queue.pause import pause, resume
from millstream.worker.supervision import supervisor as module
from millstream.worker.supervision.plan import Plan

TESTS = Path(__file__).parents[1]
WORKERS, WINDOW, MAX_ATTEMPTS = 4, 16, 3
ENDS = {"exit": "crash:exit", "segfault": "segfault:segv", "memory": "memory:oom"}
"""How a forward can end its process, by an echo model's habit and the word it does it at."""

LONG = bool(os.environ.get("MILLSTREAM_LONG"))

POSITIONS = range(WINDOW) if LONG else (0, WINDOW // 2 - 1, WINDOW - 1)
"""Positions in a window of a job that exits: its ends and its middle. MILLSTREAM_LONG=1 tries each."""

SOME = range(WINDOW) if LONG else (WINDOW // 2,)
"""Positions for the slower ends: how a worker died changes nothing in how its window is divided."""

HOW = {"exit": "exited with status 1", "segfault": "was killed by SIGSEGV", "memory": "was killed by SIGKILL"}
"""What its supervisor sees of it."""


@pytest.fixture(scope="module")
def site(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    spec = echo(",".join(ENDS.values()), batch_size=WINDOW, max_attempts=MAX_ATTEMPTS)
    with site_of(url, spec, tmp_path_factory.mktemp("poison")) as site:
        site.start_host(WORKERS)
        yield site


@pytest.fixture(scope="module")
def ledger(site: Site) -> Iterator[Ledger]:
    with site.ledger() as ledger:
        yield ledger


def windows() -> list[list[str]]:
    """A full window for each worker."""
    return [[f"neighbour-{number}"] for number in range(WORKERS * WINDOW)]


def send_at_once(site: Site, ledger: Ledger, jobs: list[list[str]]) -> list[str]:
    """Have `jobs` wait before any worker sees the first: whoever claims first finds its window full."""
    pause(site.connection.client, site.keys)
    ids = ledger.send(jobs)
    resume(site.connection.client, site.keys)
    return ids


@pytest.mark.parametrize(
    ("end", "at"),
    [
        *[("exit", at) for at in POSITIONS],
        *[(end, at) for end in ("segfault", "memory") for at in SOME],
    ],
)
def test_wherever_a_poison_job_lies_it_alone_is_buried_after_three_deaths(
    site: Site, ledger: Ledger, end: str, at: int
) -> None:
    site.await_workers(WORKERS)
    (host,) = site.hosts
    deaths, buried = host.deaths(), len(site.watch.dead_letters())
    poison = ENDS[end].partition(":")[2]
    jobs = windows()
    jobs[at] = [poison]
    # Others call on: an idle worker would see what is given back only when its sleep of a second ends.
    company = Load(ledger, ["company"], 1)

    # Who has answered something and then dies is replaced at once: it died of a job.
    ledger.wait_for(ledger.send(windows()))
    ids = send_at_once(site, ledger, jobs)
    company.start()
    ledger.wait_for(ids)
    company.stop()

    replies = [reply for job in ids for reply in ledger.replies[job]]
    assert [reply.values for reply in replies] == [None if job == [poison] else job for job in jobs]
    assert isinstance(replies[at].error, WorkerLost)
    (letter,) = site.watch.dead_letters()[buried:]
    assert letter[b"id"].decode() == ids[at]
    assert history(letter) == [f"{HOW[end]} during run"] * MAX_ATTEMPTS
    assert host.deaths() - deaths == MAX_ATTEMPTS
    assert site.watch.depth() == 0


def history(letter: Mapping[bytes, bytes]) -> list[str]:
    """How each start of a buried job ended."""
    return [line.split(" ", 2)[2] for line in letter[b"history"].decode().splitlines()]


# -- before and after the forward ----------------------------------------------------------------------------------

STAGES = {
    "exit in check": ("prepare", "exited with status 7"),
    "leave in check": ("prepare", "exited with status 0"),
    "hang in check": ("prepare", "was killed by SIGKILL"),
    "exhaust in cost": ("prepare", "was killed by SIGKILL"),
    "exit in cost": ("prepare", "exited with status 7"),
    "exit in settle": ("settle", "exited with status 7"),
    "hang in settle": ("settle", "was killed by SIGKILL"),
}
"""How a payload ends its worker, in which stage, and what its supervisor sees of it."""


BY_DEFAULT = ["exit in check", "exhaust in cost", "exit in settle", "hang in settle"]
"""Each stage and each end."""


@pytest.mark.parametrize("poison", STAGES if LONG else BY_DEFAULT)
def test_a_job_that_ends_its_worker_outside_of_a_forward_alone_is_buried(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, poison: str
) -> None:
    spec = custom("deadly:Deadly", batch_size=WINDOW, max_attempts=MAX_ATTEMPTS, stall_timeout=2)
    jobs = [[f"neighbour-{number}"] for number in range(12)]
    jobs[5] = [poison]

    with site_of(url, spec, tmp_path / "site") as site:
        buried_alone(site, jobs, poison, STAGES[poison], caplog)


def test_a_job_that_ends_its_worker_in_the_tokenizer_alone_is_buried(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = echo("tokenizer:heavy", batch_size=WINDOW, max_attempts=MAX_ATTEMPTS)
    jobs = [[f"neighbour-{number}"] for number in range(12)]
    jobs[5] = ["heavy"]

    with site_of(url, spec, tmp_path / "site") as site:
        buried_alone(site, jobs, "heavy", ("prepare", "was killed by SIGKILL"), caplog)


def buried_alone(
    site: Site, jobs: list[list[str]], poison: str, ends: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Run `jobs` and those that come afterwards by one worker; only `poison` costs it its life, and only in `ends`."""
    stage, how = ends
    with supervising(site.url, Plan(site.spec, 1, folder=str(TESTS))) as supervision, site.ledger() as ledger:
        site.await_workers(1)
        ids = send_at_once(site, ledger, jobs)
        ledger.wait_for(ids)
        ledger.wait_for(ledger.send([["afterwards"]]), within_s=5.0)
        (past,) = [fields[b"past"].decode() for fields in site.watch.workers().values()]
        restarts = supervision.supervisor.restarts

    replies = [reply for job in ids for reply in ledger.replies[job]]
    at = jobs.index([poison])
    assert [n for n, reply in enumerate(replies) if reply.error or reply.errors] == [at]
    assert isinstance(replies[at].error, WorkerLost)
    (letter,) = site.watch.dead_letters()
    assert letter[b"id"].decode() == ids[at]
    assert len(history(letter)) == MAX_ATTEMPTS
    assert all(line.startswith(f"{how} during {stage}") for line in history(letter))
    assert past.startswith(f"{how} during {stage}")
    assert restarts == MAX_ATTEMPTS
    assert said(caplog, "died early", logging.ERROR)() == []
    assert site.watch.depth() == 0


def test_every_job_of_a_forward_of_thousands_is_charged_with_its_death(url: str, tmp_path: Path) -> None:
    spec = echo("sleep:1.5,crash:poison", batch_size=1_000_000, max_batch_tokens=100_000, max_attempts=2)
    with site_of(url, spec, tmp_path / "site") as site, supervising(url, Plan(spec, 1)), site.ledger() as ledger:
        site.await_workers(1)
        send_at_once(site, ledger, [["neighbour"]] * 2_500 + [["poison"]])

        # The first forward has what one claim gave, the next one all the rest.
        eventually(lambda: site.watch.counted("running"), within_s=5.0)
        eventually(lambda: max(site.watch.counted("running").values(), default=0) > 2_000, within_s=20.0)
        pause(site.connection.client, site.keys)
        eventually(lambda: site.watch.attempts() == 1)

        assert site.watch.charged(1.0) == site.watch.depth() > 2_000


# -- what is more urgent meanwhile ---------------------------------------------------------------------------------


class Urgent(threading.Thread):
    """Sends a realtime job every 0.12 s, whatever became of those before, and notes how long each took."""

    EVERY_S = 0.12

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(name="urgent")
        self.took_s: list[float] = []
        self._ledger = ledger
        self._over = threading.Event()
        self._callers: list[threading.Thread] = []

    def run(self) -> None:
        while not self._over.wait(self.EVERY_S):
            self._callers.append(threading.Thread(target=self._call))
            self._callers[-1].start()
        for caller in self._callers:
            caller.join()

    def _call(self) -> None:
        start = time.monotonic()
        self._ledger.wait_for(self._ledger.send([["urgent"]], Priority.REALTIME))
        self.took_s.append(time.monotonic() - start)

    def stop(self) -> list[float]:
        """The seconds of each call, the shortest first, once all are answered."""
        self._over.set()
        self.join()
        return sorted(self.took_s)


def test_a_job_of_a_batch_of_64_that_kills_its_worker_keeps_no_realtime_call_waiting(url: str, tmp_path: Path) -> None:
    spec = echo("sleep:0.05,crash:poison", batch_size=64, max_attempts=MAX_ATTEMPTS)
    jobs = [[f"neighbour-{number}"] for number in range(64)]
    jobs[37] = ["poison"]
    with site_of(url, spec, tmp_path / "urgent") as site, site.ledger() as ledger:
        host = site.start_host(2)
        site.await_workers(2)
        # Who has answered something and then dies is replaced at once.
        ledger.wait_for(ledger.send(windows()))
        urgent = Urgent(ledger)
        urgent.start()
        pause(site.connection.client, site.keys)
        ids = ledger.send(jobs, Priority.BATCH)
        resume(site.connection.client, site.keys)

        ledger.wait_for(ids)
        eventually(lambda: len(urgent.took_s) >= 100, within_s=60.0)
        took_s = urgent.stop()

        assert [letter[b"id"].decode() for letter in site.watch.dead_letters()] == [ids[37]]
        assert [ledger.replies[job][0].values for job in ids] == [None if each == ["poison"] else each for each in jobs]
        assert host.deaths() == MAX_ATTEMPTS
        assert took_s[int(0.99 * len(took_s))] < 1.0


# -- what the supervisor makes of it -------------------------------------------------------------------------------


@pytest.fixture
def alone(url: str, tmp_path: Path) -> Iterator[Site]:
    """A service for one worker."""
    with site_of(url, echo("crash:poison", max_attempts=2), tmp_path / "alone") as site:
        yield site


def test_poison_jobs_among_others_do_not_pass_for_a_crash_loop(alone: Site, caplog: pytest.LogCaptureFixture) -> None:
    with supervising(alone.url, Plan(alone.spec, 1)) as supervision, alone.ledger() as ledger:
        for _ in range(3):
            ledger.wait_for(ledger.send([["neighbour"], ["poison"], ["neighbour"]]))
            ledger.wait_for(ledger.send([["neighbour"]]))

    assert supervision.supervisor.restarts == 3 * 2
    assert said(caplog, "died early", logging.ERROR)() == []
    pauses = {message.rpartition("; the next starts in ")[2] for message in said(caplog, "the next starts in")()}
    assert pauses <= {"0.5 s", "1 s"}


def test_a_worker_that_dies_of_every_job_is_in_a_crash_loop(
    alone: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_BACKOFF_S", 0.1)
    told = said(caplog, "5 workers in a row died early", logging.ERROR)

    with supervising(alone.url, Plan(alone.spec, 1)) as supervision, alone.ledger() as ledger:
        ledger.send([["poison"]] * 20)
        eventually(told, within_s=60.0)
        assert supervision.supervisor.restarts == 5

    pauses = [message.rpartition("; the next starts in ")[2] for message in said(caplog, "the next starts in")()]
    assert pauses == ["0.1 s", "0.2 s", "0.4 s", "0.8 s", "30 s"]


# ------------------------------------------------------------------------------------------------------------------


def test_a_job_that_makes_the_model_raise_fails_alone_and_its_worker_goes_on(supervised: Supervised) -> None:
    site = supervised(echo("raise:poison", batch_size=64), 1)
    workers = site.watch.live()
    jobs = [["neighbour"]] * 31 + [["poison"]] + [["neighbour"]] * 32

    with site.ledger() as ledger:
        ids = ledger.send(jobs)
        ledger.wait_for(ids)

    replies = [reply for job in ids for reply in ledger.replies[job]]
    assert [reply.values or None for reply in replies] == [None if job == ["poison"] else job for job in jobs]
    assert isinstance(replies[31].errors[0], ModelFailed)
    assert site.watch.live() == workers
    assert site.watch.dead_letters() == []
    assert site.watch.depth() == 0
