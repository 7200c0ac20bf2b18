"""Draining: what was claimed is answered, nothing starts twice, and the exit status says that all is well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from e2e.conftest import Say
from e2e.hosts import Host, gone
from e2e.ledger import Ledger, Load
from e2e.reference import TEXTS
from e2e.sites import Site, echo, site_of
from e2e.supervisors import supervising
from support import eventually

from millstream.worker.supervision.plan import Plan

JOBS = 2000
"""More than two workers run within seconds: each test ends them amid their work."""


@pytest.fixture
def site(url: str, tmp_path: Path) -> Iterator[Site]:
    """A service whose forwards take 20 ms and 8 rows: two workers run at most 800 jobs a second."""
    with site_of(url, echo("sleep:0.02", batch_size=8), tmp_path / "site") as site:
        yield site


@pytest.fixture
def ledger(site: Site) -> Iterator[Ledger]:
    with site.ledger() as ledger:
        yield ledger


def amid_work(site: Site, ledger: Ledger) -> Host:
    """A host with two workers that both hold jobs, have answered some, and have many waiting."""
    host = site.start_host(2)
    site.await_workers(2)
    before = ledger.answered
    ledger.send([[text] for text in (TEXTS * JOBS)[:JOBS]])
    workers = site.watch.live()
    eventually(lambda: all(site.watch.held(consumer) for consumer in workers) and ledger.answered > before + 100)
    return host


@pytest.mark.parametrize("end", [Host.terminate, Host.interrupt], ids=["SIGTERM", "Ctrl-C"])
def test_a_drain_loses_nothing_and_starts_nothing_twice(
    site: Site, ledger: Ledger, end: Callable[[Host], None]
) -> None:
    host = amid_work(site, ledger)

    end(host)

    assert host.wait(20.0) == 0
    assert site.watch.held() == []
    assert site.watch.workers() == {}
    eventually(lambda: ledger.answered + site.watch.depth() == len(ledger.sent))
    assert site.watch.depth() > 0
    assert host.rows_run() == ledger.answered

    other = site.start_host(2)
    ledger.wait_for(list(ledger.sent))
    end(other)

    assert other.wait(20.0) == 0
    assert host.rows_run() + other.rows_run() == len(ledger.sent) == JOBS
    assert ledger.answered_more_than_once() == []
    assert site.watch.depth() == 0


def test_workers_drain_by_themselves_where_their_supervisor_was_killed(site: Site, ledger: Ledger) -> None:
    host = amid_work(site, ledger)
    workers = host.children

    host.kill()

    gone(workers, within_s=5.0)
    assert site.watch.held() == []
    assert site.watch.workers() == {}
    eventually(lambda: ledger.answered + site.watch.depth() == len(ledger.sent))
    assert host.rows_run() == ledger.answered
    assert ledger.answered_more_than_once() == []


# -- ends that were ordered ----------------------------------------------------------------------------------------


def test_three_drains_that_are_cut_short_cost_a_long_job_no_attempt(url: str, tmp_path: Path) -> None:
    with site_of(url, echo("hang:long", max_attempts=1), tmp_path / "site") as site, site.ledger() as ledger:
        ledger.send([["long"]])
        attempts = []
        for _ in range(4):
            # With one attempt behind it the job would be buried instead.
            with supervising(url, Plan(site.spec, 1), drain_s=0.2):
                eventually(lambda: running(site) == 1, within_s=30.0)
            attempts.append((site.watch.attempts(), len(site.watch.held("returned"))))

        assert attempts == [(0.0, 1)] * 4
        assert site.watch.dead_letters() == []


def test_a_job_that_ends_its_worker_while_this_drains_has_one_attempt_behind_it(url: str, tmp_path: Path) -> None:
    with site_of(url, echo("sleep:2,crash:poison"), tmp_path / "site") as site, site.ledger() as ledger:
        ledger.send([["poison"]])
        with supervising(url, Plan(site.spec, 1)):
            eventually(lambda: running(site) == 1, within_s=30.0)

        assert (site.watch.attempts(), site.watch.workers()) == (1.0, {})


def test_a_drain_that_a_second_interrupt_cuts_short_costs_no_attempt(url: str, tmp_path: Path) -> None:
    with site_of(url, echo("hang:long"), tmp_path / "site") as site, site.ledger() as ledger:
        host = site.start_host(2)
        site.await_workers(2)
        ledger.send([["long"]])
        eventually(lambda: running(site) == 1)

        host.interrupt()
        eventually(lambda: "draining" in states(site))
        host.interrupt()

        assert host.wait(10.0) != 0
        assert site.watch.attempts() == 0
        assert (len(site.watch.held("returned")), site.watch.workers()) == (1, {})


def running(site: Site) -> int:
    """Jobs whose forward is under way, as the workers say."""
    return sum(site.watch.counted("running").values())


def states(site: Site) -> set[str]:
    return {fields[b"state"].decode() for fields in site.watch.workers().values()}


def test_a_worker_from_elsewhere_with_only_the_url_takes_its_share(site: Site, ledger: Ledger, say: Say) -> None:
    site.start_host(1)
    site.await_workers(1)
    (first,) = site.watch.live()
    load = Load(ledger, TEXTS, 32)

    with ExitStack() as ends:
        load.start()
        ends.callback(load.stop)
        site.start_host(1)
        site.await_workers(2)
        before = site.watch.counted("jobs")
        eventually(lambda: sum(site.watch.counted("jobs").values()) > sum(before.values()) + 1000, within_s=30.0)
        after = site.watch.counted("jobs")

    ran = {consumer: after[consumer] - before[consumer] for consumer in after}
    share = sum(jobs for consumer, jobs in ran.items() if consumer != first) / sum(ran.values())
    say(f"the second of two workers took {share:.0%} of {sum(ran.values())} jobs")
    assert share >= 0.3
