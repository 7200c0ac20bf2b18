"""Limits that are pushed bind running workers and clients within a second or so, without a restart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from contracts.queue import Queue, draft
from e2e.ledger import Ledger
from e2e.sites import Site, echo, site_of
from e2e.supervisors import beaten
from support import eventually

from millstream.broker.config.load import Runtime
from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import NoWorkers, QueueFull, WorkerLost
from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import GROUP
from millstream.broker.queue.registry import Registry
from millstream.client import Client


@pytest.fixture
def site(url: str, tmp_path: Path) -> Iterator[Site]:
    """A service whose forwards take 50 ms and at most 4 rows or 64 tokens."""
    limits = {"batch_size": 4, "max_batch_tokens": 64, "max_queue_size": 100, "batch_timeout": 0.0, "total_timeout": 20}
    with site_of(url, echo("sleep:0.05", **limits), tmp_path / "site") as site:
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
    # Patience is learned: the first pairs teach it.
    pairs(worked, ledger)
    before = pairs(worked, ledger)

    push(worked, batch_timeout=1.0)

    assert pairs(worked, ledger) < 0.75 * before


PAIRS = 20


def pairs(site: Site, ledger: Ledger) -> int:
    """How many forwards these jobs take, every second of which is sent when the one before it was claimed."""
    before = site.watch.counted("forwards")
    rows = sum(site.watch.counted("rows").values())
    for _ in range(PAIRS):
        first = ledger.send([["a"]])
        eventually(partial(begun, site, ledger, first))
        ledger.wait_for([*first, *ledger.send([["b"]])])
    eventually(lambda: sum(site.watch.counted("rows").values()) == rows + 2 * PAIRS)
    return sum(site.watch.counted("forwards").values()) - sum(before.values())


def begun(site: Site, ledger: Ledger, jobs: Sequence[str]) -> bool:
    """Whether somebody took the jobs; or they are over already, since whoever looks may be slow."""
    return bool(site.watch.held()) or all(job in ledger.replies for job in jobs)


def test_fewer_attempts_bind_a_running_worker(site: Site) -> None:
    queue = Queue(site.connection.client, site.keys)
    (job,) = queue.put(draft())
    ((entry, fields),) = queue.jobs()
    site.connection.client.xdel(site.keys.stream(Priority.NORMAL), entry)
    site.start_host(1)
    site.await_workers(1)

    push(site, max_attempts=1)
    attempted_elsewhere(queue, fields)

    eventually(queue.replies)
    ((replied_to, reply),) = queue.replies()
    assert replied_to == job.id
    assert isinstance(decode_reply(reply).error, WorkerLost)


def attempted_elsewhere(queue: Queue, fields: dict[bytes, bytes]) -> None:
    """A job that another worker, which died of it, snatches from those that wait."""
    stream, entry = queue.keys.stream(Priority.NORMAL), f"{queue.now() + 60_000}-0"
    with queue.client.pipeline(transaction=True) as pipe:
        pipe.set(queue.keys.seen(fields[b"id"].decode()), entry)
        pipe.xadd(stream, {name.decode(): value for name, value in fields.items()}, id=entry)
        pipe.xreadgroup(GROUP, "other", {stream: ">"}, count=1)
        pipe.execute()
    queue.lease.release("other", started=queue.held_by("other"), gone=True)


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
