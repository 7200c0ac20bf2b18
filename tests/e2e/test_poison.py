"""A job that kills its worker, or makes the model raise, harms none of those that run beside it."""

from __future__ import annotations

import pytest
from e2e.conftest import Supervised
from e2e.sites import echo

from millstream.broker.errors import ModelFailed, WorkerLost

NEIGHBOURS = [[f"neighbour {number}"] for number in range(63)]
MAX_ATTEMPTS = 3


@pytest.mark.parametrize("at", [0, 63], ids=["first", "last"])
def test_a_poison_job_is_buried_after_three_deaths_and_its_neighbours_are_answered(
    supervised: Supervised, at: int
) -> None:
    site = supervised(echo("crash:poison", batch_size=64, max_attempts=MAX_ATTEMPTS), 2)
    jobs = [*NEIGHBOURS[:at], ["poison"], *NEIGHBOURS[at:]]

    with site.ledger() as ledger:
        ids = ledger.send(jobs)
        ledger.wait_for(ids)
        site.await_workers(2)

    replies = [reply for job in ids for reply in ledger.replies[job]]
    assert [reply.values for reply in replies] == [None if job == ["poison"] else job for job in jobs]
    assert isinstance(replies[at].error, WorkerLost)
    assert [letter[b"id"].decode() for letter in site.watch.dead_letters()] == [ids[at]]
    assert sum(host.deaths() for host in site.hosts) == MAX_ATTEMPTS
    assert site.watch.depth() == 0


def test_a_job_that_makes_the_model_raise_fails_alone_and_its_worker_goes_on(supervised: Supervised) -> None:
    site = supervised(echo("raise:poison", batch_size=64), 1)
    workers = site.watch.live()
    jobs = [*NEIGHBOURS[:31], ["poison"], *NEIGHBOURS[31:]]

    with site.ledger() as ledger:
        ids = ledger.send(jobs)
        ledger.wait_for(ids)

    replies = [reply for job in ids for reply in ledger.replies[job]]
    assert [reply.values or None for reply in replies] == [None if job == ["poison"] else job for job in jobs]
    assert isinstance(replies[31].errors[0], ModelFailed)
    assert site.watch.live() == workers
    assert site.watch.dead_letters() == []
    assert site.watch.depth() == 0
