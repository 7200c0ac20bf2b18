"""Two services in one worker process: both answer, and a fault of one costs the other's jobs nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.ledger import Load
from e2e.reference import TEXTS, Reference
from e2e.sites import Site, custom, echo, minilm, site_of
from e2e.supervisors import Supervision, supervising
from support import eventually

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import WorkerLost
from millstream.worker.supervision.plan import Plan

TESTS = Path(__file__).parents[1]
MAX_ATTEMPTS = 3
LONG = bool(os.environ.get("MILLSTREAM_LONG"))


@contextmanager
def two_lanes(url: str, home: Path, one: ServiceSpec, two: ServiceSpec) -> Iterator[tuple[Site, Site, Supervision]]:
    """One worker process that hosts both services."""
    plan = Plan(one, 1, folder=str(TESTS), beside=[two])
    with (
        site_of(url, one, home / "one") as first,
        site_of(url, two, home / "two") as second,
        supervising(url, plan) as supervision,
    ):
        first.await_workers(1)
        second.await_workers(1)
        supervision.ready(1)
        yield first, second, supervision


def test_two_services_of_one_process_both_answer_under_their_own_names(url: str, tmp_path: Path) -> None:
    with (
        two_lanes(url, tmp_path, echo("one"), echo("two")) as (one, two, supervision),
        one.ledger() as first,
        two.ledger() as second,
    ):
        ones, twos = first.send([["a"], ["b"], ["c"]]), second.send([["x", "y"]])
        first.wait_for(ones)
        second.wait_for(twos)

        assert [first.replies[job][0].values for job in ones] == [["a"], ["b"], ["c"]]
        assert [second.replies[job][0].values for job in twos] == [["x", "y"]]
        assert one.watch.live() == two.watch.live()
        eventually(lambda: list(one.watch.counted("jobs").values()) == [3])
        eventually(lambda: list(two.watch.counted("jobs").values()) == [1])
        assert supervision.supervisor.tally() == {one.spec.name: (1, 1), two.spec.name: (1, 1)}
    assert one.watch.live() == two.watch.live() == {}


@pytest.mark.skipif(not LONG, reason="MILLSTREAM_LONG is not 1: two rerankers share a process in test_rerank.py")
def test_an_embedding_model_shares_a_process_with_another_service(
    url: str, tmp_path: Path, reference: Reference
) -> None:
    with (
        two_lanes(url, tmp_path, minilm(), echo("beside")) as (one, two, _),
        one.ledger() as first,
        two.ledger() as second,
    ):
        vectors = first.send([[text] for text in TEXTS])
        texts = second.send([[text] for text in TEXTS])
        first.wait_for(vectors)
        second.wait_for(texts)

        for at, job in enumerate(vectors):
            (reply,) = first.replies[job]
            assert reply.vectors is not None
            assert float(reply.vectors[0] @ reference.vectors[at]) > 0.999
        assert [second.replies[job][0].values for job in texts] == [[text] for text in TEXTS]


def test_a_lane_that_cannot_load_its_model_ends_the_process_and_is_named(url: str, tmp_path: Path) -> None:
    one, two = echo("good"), custom("no_such_module:Nothing")
    with site_of(url, one, tmp_path / "one"), site_of(url, two, tmp_path / "two"):
        with supervising(url, Plan(one, 1, beside=[two])) as supervision:
            supervision.join(30.0)

        assert supervision.refused is not None
        refusals = supervision.supervisor.refusals()
        assert refusals.keys() == {one.name, two.name}
        assert "no_such_module" in refusals[one.name]


# -- a fault of one lane -------------------------------------------------------------------------------------------


def test_a_job_that_kills_the_process_in_a_forward_costs_the_other_lane_no_attempt(url: str, tmp_path: Path) -> None:
    # One attempt: a job of the other lane that is charged once would be buried.
    one = echo("sleep:0.1,crash:poison", max_attempts=MAX_ATTEMPTS)
    two = echo("sleep:0.05", batch_size=1, max_attempts=1)
    with (
        two_lanes(url, tmp_path, one, two) as (first_site, second_site, supervision),
        first_site.ledger() as first,
        second_site.ledger() as second,
    ):
        waiting = second.send([[f"neighbour-{number}"] for number in range(40)])
        eventually(second_site.watch.held)
        (poison,) = first.send([["poison"]])
        first.wait_for([poison])
        second.wait_for(waiting)

        assert isinstance(first.replies[poison][0].error, WorkerLost)
        assert [second.replies[job][0].error for job in waiting] == [None] * len(waiting)
        assert second_site.watch.dead_letters() == []
        assert len(first_site.watch.dead_letters()) == 1
        assert supervision.supervisor.restarts == MAX_ATTEMPTS
        assert second.answered_more_than_once() == []


STAGES = {
    "exit in check": "prepare",
    "exit in cost": "prepare",
    "exhaust in cost": "prepare",
    "hang in check": "prepare",
    "exit in run": "run",
    "exit in settle": "settle",
}
"""How a payload ends its worker, and in which stage."""


def running(supervision: Supervision, service: str) -> list[str]:
    """The entries in the running forward of the only process, read from its page."""
    (slot,) = supervision.supervisor._slots
    return slot.child.pages[service].running() if slot.child else []


@pytest.mark.parametrize("poison", STAGES if LONG else ["exit in check", "exit in run"])
def test_a_job_that_kills_the_process_in_any_stage_alone_is_buried(url: str, tmp_path: Path, poison: str) -> None:
    # One attempt: a job of the other lane that is charged once would be buried.
    one = custom("deadly:Deadly", batch_size=16, max_attempts=MAX_ATTEMPTS, stall_timeout=2)
    two = echo("", max_attempts=1)
    with (
        two_lanes(url, tmp_path, one, two) as (first_site, second_site, supervision),
        first_site.ledger() as first,
        second_site.ledger() as second,
    ):
        slow = first.send([["slow in run"]])
        eventually(lambda: running(supervision, one.name))
        # While the first lane has the device: at the death that nobody could foresee, these jobs wait.
        waiting = second.send([[f"neighbour-{number}"] for number in range(20)]) if STAGES[poison] == "prepare" else []
        (guilty,) = first.send([[poison]])
        eventually(lambda: supervision.supervisor.restarts >= 1, within_s=20.0)
        # From now on it is a suspect, and the other lane may be at work.
        load = Load(second, ["neighbour"], 2)
        load.start()
        first.wait_for([guilty, *slow])
        load.stop()
        second.wait_for(waiting)

        assert isinstance(first.replies[guilty][0].error, WorkerLost)
        assert [letter[b"id"].decode() for letter in first_site.watch.dead_letters()] == [guilty]
        assert first.replies[slow[0]][0].error is None
        assert [str(reply.error) for replies in second.replies.values() for reply in replies if reply.error] == []
        assert second_site.watch.dead_letters() == []
        assert second.answered_more_than_once() == []


def test_a_slow_forward_of_one_lane_is_no_time_of_the_other_lanes_jobs(url: str, tmp_path: Path) -> None:
    slow = echo("sleep:1", batch_size=1)
    quick = echo("", inference_timeout=0.3, stall_timeout=0.6)
    with (
        two_lanes(url, tmp_path, slow, quick) as (slow_site, quick_site, supervision),
        slow_site.ledger() as first,
        quick_site.ledger() as second,
    ):
        start = time.monotonic()
        slow_jobs = first.send([["a"], ["b"], ["c"]])
        eventually(lambda: sum(slow_site.watch.counted("running").values()) == 1, within_s=5.0)
        quick_jobs = second.send([[f"text-{number}"] for number in range(20)])
        second.wait_for(quick_jobs)
        first.wait_for(slow_jobs)

        assert time.monotonic() - start >= 3.0
        assert [second.replies[job][0].error for job in quick_jobs] == [None] * 20
        assert supervision.supervisor.restarts == 0


def test_a_lane_that_stalls_is_killed_and_the_other_lanes_jobs_keep_their_attempts(url: str, tmp_path: Path) -> None:
    one, two = echo("hang:poison", stall_timeout=1, max_attempts=1), echo("", max_attempts=1)
    with (
        two_lanes(url, tmp_path, one, two) as (first_site, second_site, supervision),
        first_site.ledger() as first,
        second_site.ledger() as second,
    ):
        (poison,) = first.send([["poison"]])
        eventually(lambda: first_site.watch.held())
        waiting = second.send([[f"neighbour-{number}"] for number in range(20)])
        first.wait_for([poison])
        second.wait_for(waiting)

        assert isinstance(first.replies[poison][0].error, WorkerLost)
        assert [second.replies[job][0].error for job in waiting] == [None] * 20
        assert supervision.supervisor.restarts == 1


@pytest.mark.parametrize("drained", ["at rest", "at work"])
def test_a_drain_settles_what_both_lanes_hold(url: str, tmp_path: Path, drained: str) -> None:
    with (
        two_lanes(url, tmp_path, echo("sleep:0.05"), echo("sleep:0.02")) as (one, two, supervision),
        one.ledger() as first,
        two.ledger() as second,
    ):
        if drained == "at work":
            first.send([[f"a-{number}"] for number in range(300)])
            second.send([[f"b-{number}"] for number in range(300)])
            eventually(lambda: one.watch.held() and two.watch.held())
        supervision.end()

        assert one.watch.held() == two.watch.held() == []
        assert one.watch.live() == two.watch.live() == {}
        assert supervision.supervisor.restarts == 0
