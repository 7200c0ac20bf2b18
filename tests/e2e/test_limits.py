"""Limits that are pushed bind running workers and clients within a second or so, without a restart."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from contracts.queue import Queue
from e2e.ledger import Ledger
from e2e.sites import Site, echo, site_of
from e2e.supervisors import beaten
from support import eventually

from millstream.broker.config import Runtime
from millstream.broker.errors import NoWorkers, QueueFull, WorkerLost
from millstream.broker.registry import Registry
from millstream.client import Client


@pytest.fixture
def site(url: str, tmp_path: Path) -> Iterator[Site]:
    """A service whose forwards take 10 ms and at most 4 rows or 64 tokens."""
    limits = {"batch_size": 4, "max_batch_tokens": 64, "max_queue_size": 100, "batch_timeout": 0.0, "total_timeout": 20}
    with site_of(url, echo("sleep:0.01", **limits), tmp_path / "site") as site:
        yield site


@pytest.fixture
def worked(site: Site) -> Site:
    """The same, with one worker."""
    site.start_host(1)
    site.await_workers(1)
    return site


@pytest.fixture
def ledger(site: Site) -> Iterator[Ledger]:
    with site.ledger() as ledger:
        yield ledger


def push(site: Site, **limits: object) -> None:
    """Publish the service with these limits changed, and wait until its workers have beaten twice since."""
    runtime = Runtime.model_validate(site.spec.runtime.model_dump() | limits)
    Registry(site.connection).push([site.spec.model_copy(update={"runtime": runtime})], replace=True)
    # It hears of the push in one beat; the next one shows that it did.
    beaten(site, 2)


def forwards_of(site: Site, ledger: Ledger, texts: list[str]) -> int:
    """How many forwards these texts take, a job each, sent at once."""
    before = sum(site.watch.counted("forwards").values())
    rows = sum(site.watch.counted("rows").values())
    ledger.wait_for(ledger.send([[text] for text in texts]))
    eventually(lambda: sum(site.watch.counted("rows").values()) == rows + len(texts))
    return sum(site.watch.counted("forwards").values()) - before


def test_a_larger_batch_size_binds_a_running_worker(worked: Site, ledger: Ledger) -> None:
    workers = worked.watch.live()
    before = forwards_of(worked, ledger, ["a"] * 64)

    push(worked, batch_size=32)

    assert before == 16
    assert forwards_of(worked, ledger, ["a"] * 64) == 2
    assert worked.watch.live() == workers


def test_a_smaller_token_budget_binds_a_running_worker(worked: Site, ledger: Ledger) -> None:
    ten_tokens = " ".join(["word"] * 10)
    before = forwards_of(worked, ledger, [ten_tokens] * 32)

    push(worked, max_batch_tokens=20)

    assert before == 8
    assert forwards_of(worked, ledger, [ten_tokens] * 32) == 16


def test_a_longer_batch_timeout_binds_a_running_worker(worked: Site, ledger: Ledger) -> None:
    push(worked, batch_size=64, max_batch_tokens=4096)
    trickle(worked, ledger)
    before = trickle(worked, ledger)

    push(worked, batch_size=64, max_batch_tokens=4096, batch_timeout=0.2)

    trickle(worked, ledger)
    assert trickle(worked, ledger) < before / 2


def trickle(site: Site, ledger: Ledger) -> int:
    """How many forwards 200 jobs take that are sent one by one."""
    before = sum(site.watch.counted("forwards").values())
    rows = sum(site.watch.counted("rows").values())
    for _ in range(200):
        ledger.send([["a"]])
    eventually(lambda: sum(site.watch.counted("rows").values()) == rows + 200)
    return sum(site.watch.counted("forwards").values()) - before


def test_fewer_attempts_bind_a_running_worker(worked: Site, ledger: Ledger) -> None:
    ((_, pid),) = worked.watch.live().items()
    queue = Queue(worked.connection.client, worked.keys)
    push(worked, max_attempts=1)

    # A job with one attempt behind it, made while the worker cannot take it.
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: asleep(pid))
        ids = ledger.send([["a"]])
        claims = queue.claim("other").claims
        queue.lease.release("other", started=queue.held_by("other"), gone=True)
    finally:
        os.kill(pid, signal.SIGCONT)
    ledger.wait_for(ids)

    assert [claim.address.job_id for claim in claims] == ids
    assert isinstance(ledger.replies[ids[0]][0].error, WorkerLost)


def asleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_shorter_stall_timeout_binds_a_running_worker_and_its_supervisor(url: str, tmp_path: Path) -> None:
    spec = echo("hang:poison", stall_timeout=100, max_attempts=1)
    with site_of(url, spec, tmp_path / "stall") as site, site.ledger() as ledger:
        host = site.start_host(1)
        site.await_workers(1)

        push(site, stall_timeout=1)
        ledger.wait_for(ledger.send([["poison"]]), within_s=30.0)

        assert host.deaths() == 1


def test_a_longer_queue_binds_every_client_at_once(site: Site, ledger: Ledger) -> None:
    with Client(site.url) as client:
        ledger.send([["a"]] * 100)
        with pytest.raises(QueueFull):
            client.submit(site.spec.name, ["a"], wait=False).result(10.0)

        push(site, max_queue_size=101)

        with pytest.raises(NoWorkers):
            client.submit(site.spec.name, ["a"], wait=False, timeout=0.5).result()


def test_a_shorter_total_timeout_binds_a_client_within_about_a_second(site: Site) -> None:
    with Client(site.url) as client:

        def told_in_time() -> bool:
            call = client.submit(site.spec.name, ["a"])
            return call.wait(0.6)

        assert not told_in_time()

        push(site, total_timeout=0.3)

        eventually(told_in_time, within_s=3.0)
        with pytest.raises(NoWorkers):
            client.submit(site.spec.name, ["a"]).result()
