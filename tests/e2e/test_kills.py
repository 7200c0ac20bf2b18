"""kill -9 of workers, of whole hosts and of the server, under load: nothing is lost, nothing is answered twice."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from e2e.conftest import Say, Supervised
from e2e.hosts import Host
from e2e.ledger import Ledger, Load
from e2e.reference import TEXTS, Answers, Echoes, Reference
from e2e.sites import Site, echo, minilm, site_of
from e2e.watch import Entry, freeze_with_work
from support import eventually

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.early, pytest.mark.timeout(300)]

LONG = bool(os.environ.get("MILLSTREAM_LONG"))
MODELS = ["echo", "minilm"] if LONG else ["echo"]
"""Models under a load that lasts: the real one takes the cores from other tests all the while."""

SERVER_KILLS = 25 if LONG else 12
"""About every third kill cuts off the answer to an enqueue: fewer kills would often prove nothing."""

CALLER_PROCESSES, CALLER_THREADS, LEDGER_THREADS = 2, 2, 4

FLOWING = 50
"""So many answers say that all is well again."""

DEAD_WORKER_S = 2.0
LOST_HOST_S = 8.0


class Mill:
    """Two hosts with one worker each: two workers, and always a second supervisor.

    The tests kill no host's worker more than four times: the fifth young death in a row counts as a crash loop.
    """

    def __init__(self, site: Site, answers: Answers) -> None:
        self.site = site
        self.answers = answers
        self.watch = site.watch
        self._cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
        for _ in range(2):
            self.start_host()
        site.await_workers(2)

    def start_host(self) -> Host:
        # A core for each, as hosts have: one that starts a model must not slow down its neighbour.
        return self.site.start_host(1, cores=[next(self._cores)])

    @property
    def hosts(self) -> list[Host]:
        """Those that were not lost."""
        return [host for host in self.site.hosts if host.process.poll() is None]

    def workers_of(self, host: Host) -> dict[str, int]:
        """Its live workers: consumer -> pid."""
        children = host.children
        return {consumer: pid for consumer, pid in self.watch.live().items() if pid in children}

    def taken_over(self, held: list[Entry], dead: Mapping[str, int]) -> float:
        """Seconds until everything in `held` is settled, or owned by a worker that lives and is not one of `dead`."""
        killed_at = time.monotonic()
        eventually(lambda: not self.watch.unsettled(held, self.watch.live().keys() - dead.keys()), within_s=30.0)
        return time.monotonic() - killed_at

    def whole(self) -> None:
        """Two workers live; no job is one death away from being buried for deaths that were not its fault."""
        self.site.await_workers(2)
        eventually(lambda: self.watch.attempts() < 2, within_s=30.0)


@contextmanager
def milling(url: str, spec: ServiceSpec, answers: Answers, home: Path) -> Iterator[Mill]:
    with site_of(url, spec, home) as site:
        yield Mill(site, answers)


@pytest.fixture(scope="module")
def mill(url: str, tmp_path_factory: pytest.TempPathFactory, reference: Reference) -> Iterator[Mill]:
    """A mill with the real model."""
    with milling(url, minilm(), reference, tmp_path_factory.mktemp("mill")) as mill:
        yield mill


@pytest.fixture(scope="module", params=MODELS)
def each_mill(url: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Mill]:
    """A mill with each of MODELS."""
    if request.param == "minilm":
        yield request.getfixturevalue("mill")
        return
    with milling(url, echo("sleep:0.02"), Echoes(), tmp_path_factory.mktemp("echo")) as mill:
        yield mill


@contextmanager
def load(mill: Mill) -> Iterator[Ledger]:
    """Callers in this and in other processes; afterwards every job has had one answer, its own, and nothing is left."""
    callers = [mill.site.start_caller(CALLER_THREADS, mill.answers) for _ in range(CALLER_PROCESSES)]
    for caller in callers:
        caller.await_first_call()
    with mill.site.ledger() as ledger:
        calls = Load(ledger, TEXTS, LEDGER_THREADS)
        calls.start()
        try:
            yield ledger
        finally:
            calls.stop()
        tallies = [caller.stop() for caller in callers]
        eventually(lambda: mill.watch.depth() == 0)

    assert [tally["wrong"] for tally in tallies] == [[]] * CALLER_PROCESSES
    assert all(tally["answered"] == tally["calls"] > 0 for tally in tallies)
    assert ledger.replies.keys() == ledger.sent.keys()
    assert ledger.answered_more_than_once() == []
    assert [job for job, (reply,) in ledger.replies.items() if mill.answers.wrong_reply(ledger.sent[job], reply)] == []
    assert mill.watch.held() == []
    assert mill.watch.dead_letters() == []


@pytest.mark.alone
def test_what_a_killed_worker_held_is_in_live_hands_within_2_seconds(each_mill: Mill, say: Say) -> None:
    with load(each_mill):
        each_mill.whole()
        victim = each_mill.workers_of(random.choice(each_mill.hosts))
        held = freeze_with_work(each_mill.watch, victim)
        kill(victim)
        seconds = each_mill.taken_over(held, victim)
        say(f"killed 1 of 2 workers with {len(held)} jobs in hand: in live hands after {seconds:.2f} s")
        assert seconds < DEAD_WORKER_S


def test_jobs_outlive_all_workers_killed_at_once(each_mill: Mill, say: Say) -> None:
    with load(each_mill):
        each_mill.whole()
        victims = each_mill.watch.live()
        held = freeze_with_work(each_mill.watch, victims)
        kill(victims)
        seconds = each_mill.taken_over(held, victims)
        say(f"killed both workers with {len(held)} jobs in hand: in live hands after {seconds:.1f} s")


def test_jobs_outlive_a_killed_server(each_mill: Mill, server: EmbeddedServer, say: Say) -> None:
    with load(each_mill) as ledger:
        for _ in range(2):
            each_mill.whole()
            enough = ledger.answered + FLOWING
            eventually(partial(ledger.has_answered, enough), within_s=30.0)
            # Taken before the kill: afterwards workers settle what they hold as soon as the server is back.
            while not (held := each_mill.watch.held()):
                eventually(each_mill.watch.held)
            os.kill(server.pid, signal.SIGKILL)
            killed_at = time.monotonic()
            server.restart()
            each_mill.taken_over(held, {})
            say(f"killed the server with {len(held)} jobs in hand: back after {time.monotonic() - killed_at:.2f} s")


def test_a_job_sent_again_because_the_server_crashed_runs_once(supervised: Supervised, server: EmbeddedServer) -> None:
    site = supervised(echo("sleep:0.01"), 2)

    with site.ledger() as ledger:
        calls = Load(ledger, TEXTS, 8)
        calls.start()
        try:
            for _ in range(SERVER_KILLS):
                eventually(partial(ledger.has_answered, ledger.answered + FLOWING), within_s=30.0)
                os.kill(server.pid, signal.SIGKILL)
                server.restart()
        finally:
            calls.stop()
        eventually(lambda: site.watch.depth() == 0)

    assert ledger.replies.keys() == ledger.sent.keys()
    assert ledger.answered_more_than_once() == []


@pytest.mark.alone
def test_what_a_lost_host_held_is_in_live_hands_within_8_seconds(each_mill: Mill, say: Say) -> None:
    with load(each_mill):
        each_mill.whole()
        host = random.choice(each_mill.hosts)
        victim = each_mill.workers_of(host)
        held = freeze_with_work(each_mill.watch, victim)
        host.lose()
        seconds = each_mill.taken_over(held, victim)
        each_mill.start_host()
        say(f"lost 1 of 2 hosts with {len(held)} jobs in hand: in live hands after {seconds:.2f} s")
        assert seconds < LOST_HOST_S
        each_mill.whole()


def test_a_worker_frozen_past_its_lease_answers_nothing_twice(supervised: Supervised) -> None:
    site = supervised(echo("sleep:1"), 2)

    with site.ledger() as ledger:
        jobs = ledger.send([[text] for text in TEXTS])
        eventually(lambda: amid_forward(site))
        pid = amid_forward(site)[0]
        os.kill(pid, signal.SIGSTOP)
        ledger.wait_for(jobs, within_s=30.0)
        os.kill(pid, signal.SIGCONT)
        site.await_workers(2)
        ledger.wait_for(ledger.send([[text] for text in TEXTS]), within_s=30.0)

    assert ledger.answered_more_than_once() == []
    assert site.watch.depth() == 0


def amid_forward(site: Site) -> list[int]:
    """The pids of workers that took jobs a while ago, and will be in the forward for a while."""
    return [pid for consumer, pid in site.watch.live().items() if 0.2 < site.watch.held_s(consumer) < 0.6]


def kill(victims: Mapping[str, int]) -> None:
    for pid in victims.values():
        os.kill(pid, signal.SIGKILL)
