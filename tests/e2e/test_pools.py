"""Several models in one process with more models than memory: each is loaded when its jobs need it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from e2e.cli_support import Shell
from e2e.pools import TESTS, held_jobs, pool_of
from e2e.sites import custom, echo, site_of
from e2e.supervisors import supervising
from support import eventually

from millstream.broker.config.load import ServiceSpec
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.metrics import Metrics
from millstream.client import Client
from millstream.worker.supervision.plan import Plan

MB = 1_000_000
SIZES = {"Small": 60 * MB, "Middle": 80 * MB, "Large": 100 * MB}


def heavy(*names: str, **runtime: object) -> list[ServiceSpec]:
    return [custom(f"heavy:{name}", **runtime) for name in names]


@pytest.fixture
def base(url: str, tmp_path: Path) -> int:
    """Bytes of the process of a pool without models."""
    with pool_of(url, tmp_path / "base", heavy("Small")) as pool:
        pool.loaded(1)
        return pool.rss() - SIZES["Small"]


def limit_of(base: int, names: Sequence[str]) -> int:
    """Memory for these models but for half of the smallest one: one of them is always missing."""
    sizes = [SIZES[name] for name in names]
    return base + sum(sizes) - min(sizes) // 2


def test_without_a_limit_all_models_are_loaded_and_stay(url: str, tmp_path: Path) -> None:
    with (
        pool_of(url, tmp_path, heavy("Small", "Middle")) as pool,
        pool.sites[0].ledger() as one,
        pool.sites[1].ledger() as two,
    ):
        pool.loaded(2)
        ones, twos = one.send([["a"], ["b"]]), two.send([["c"]])
        one.wait_for(ones)
        two.wait_for(twos)

        assert [one.replies[job][0].values for job in ones] == [["Small a"], ["Small b"]]
        assert [two.replies[job][0].values for job in twos] == [["Middle c"]]
        eventually(lambda: pool.supervision.supervisor.ready == 1)
        views = [view for view in pool.views() if view]
        assert [(view.loads, view.resident) for view in views] == [(1, True)] * 2
        sizes = [view.memory / SIZES[name] for view, name in zip(views, ("Small", "Middle"), strict=True)]
        assert all(0.9 < size < 1.3 for size in sizes), sizes


def test_more_models_than_memory_all_answer_within_the_limit(url: str, tmp_path: Path, base: int) -> None:
    names = ("Small", "Middle", "Large")
    limit = limit_of(base, names)
    with pool_of(url, tmp_path, heavy(*names), limit, residence_s=0.2) as pool, ExitStack() as ends:
        ledgers = [ends.enter_context(site.ledger()) for site in pool.sites]
        sent, most = [], 0
        for number in range(4):
            for ledger in ledgers:
                sent.append((ledger, ledger.send([[f"{at}"] for at in range(20)])))
            for ledger, jobs in sent[-3:]:
                ledger.wait_for(jobs)
                most = max(most, pool.rss() if number else 0)
            # In the first round nobody knows how large a model is before it was loaded.
            eventually(lambda: pool.rss() < 1.05 * limit)
            assert pool.states().count("ready") < 3

        assert most < 1.05 * limit
        for (ledger, jobs), name in zip(sent, names * 4, strict=True):
            assert [ledger.replies[job][0].values for job in jobs] == [[f"{name} {number}"] for number in range(20)]
            assert ledger.answered_more_than_once() == []
        assert sum(view.loads for view in pool.views() if view) > 3
        assert pool.supervision.supervisor.restarts == 0
        # What was counted before an eviction is not lost, and not counted twice.
        for site in pool.sites:
            eventually(lambda site=site: Metrics(site.connection).read(site.spec.name).work["rows"] == 80)  # type: ignore[misc]


def test_a_model_that_leaves_answers_first_what_it_holds(url: str, tmp_path: Path, base: int) -> None:
    slow, urgent = custom("heavy:Slow", batch_size=1), custom("heavy:Middle", target=0.1)
    limit = base + SIZES["Middle"] + SIZES["Small"] // 2
    with (
        pool_of(url, tmp_path, [slow, urgent], limit, residence_s=0.0) as pool,
        pool.sites[0].ledger() as one,
        pool.sites[1].ledger() as two,
    ):
        # After the first round only one of both is in memory; the jobs then bring the slow one there.
        pool.settled(1)
        held = one.send([[f"{number}"] for number in range(6)])
        eventually(lambda: len(held_jobs(pool.sites[0])) >= 2)
        mine = held_jobs(pool.sites[0])
        (job,) = two.send([["now"]])
        two.wait_for([job])
        answered = {job for job in held if one.replies.get(job)}

        assert mine <= answered
        one.wait_for(held)
        assert [one.replies[job][0].values for job in held] == [[f"Slow {number}"] for number in range(6)]
        assert one.answered_more_than_once() == []


def test_a_model_on_standby_has_a_worker_that_is_not_ready(url: str, tmp_path: Path, base: int) -> None:
    names = ("Small", "Middle")
    with pool_of(url, tmp_path, heavy(*names), limit_of(base, names), residence_s=0.0) as pool:
        pool.settled(1)
        waiting = pool.states().index("standby")
        with pool.sites[waiting].ledger() as ledger:
            jobs = ledger.send([["a"]])
            ledger.wait_for(jobs)

        eventually(lambda: pool.states()[waiting] == "ready" and "standby" in pool.states())
        assert [len(site.watch.live()) for site in pool.sites] == [1, 1]
        eventually(lambda: pool.supervision.supervisor.ready == 1)


def test_a_model_that_cannot_be_loaded_stops_no_other_and_says_why(url: str, tmp_path: Path) -> None:
    with pool_of(url, tmp_path, heavy("Small", "Broken")) as pool, pool.sites[0].ledger() as ledger:
        jobs = ledger.send([["a"]])
        ledger.wait_for(jobs)
        broken = pool.sites[1]
        eventually(lambda: "broken" in pool.supervision.supervisor.states()[broken.spec.name].unloaded, within_s=30.0)

        assert pool.sites[1].watch.live() == {}
        assert pool.supervision.supervisor.tally() == {pool.sites[0].spec.name: (1, 1), broken.spec.name: (0, 1)}
        inspector = Inspector(broken.connection)
        eventually(
            lambda: [each.state.unloaded[:10] for each in inspector.services([broken.spec.name])[0].supervisors] != [""]
        )


def test_a_model_that_is_larger_than_its_memory_limit_is_not_loaded(url: str, tmp_path: Path) -> None:
    specs = [custom("heavy:Large", memory_limit=50 * MB), echo("")]
    with pool_of(url, tmp_path, specs) as pool:
        states = pool.supervision.supervisor.states
        eventually(lambda: "memory_limit is 50 MB" in states()[specs[0].name].unloaded, within_s=30.0)
        pool.loaded(1)


def test_a_worker_of_its_own_keeps_to_its_memory_limit_too(url: str, tmp_path: Path) -> None:
    spec = custom("heavy:Large", memory_limit=50 * MB)
    with site_of(url, spec, tmp_path), supervising(url, Plan(spec, 1, folder=str(TESTS))) as supervision:
        supervision.join(30.0)

        assert "memory_limit is 50 MB" in supervision.supervisor.refusals()[spec.name]


def test_worker_run_starts_a_pool_of_the_file_and_worker_ls_shows_what_is_in_memory(url: str, tmp_path: Path) -> None:
    shell, names = Shell(tmp_path, url), [f"test-{uuid.uuid4().hex[:12]}" for _ in range(2)]
    services = ", ".join(f"{name}: {{model: e}}" for name in names)
    (tmp_path / "config.yaml").write_text(
        f"models: {{e: {{type: echo}}}}\nservices: {{{services}}}\n"
        f"pools: {{both: {{device: cpu, services: [{', '.join(names)}], memory: 4GB}}}}\n"
    )
    assert shell.run("config", "push").code == 0
    with shell.background("worker", "run", "--pool", "both") as running, Client(url) as client:
        for name in names:
            assert client.submit(name, ["text"]).result(timeout=30.0) == ["text"]
        eventually(lambda: len(running.children()) == 1)
        seen = json.loads(shell.run("worker", "ls", "--json").out)
        mine = [each for each in seen if each["service"] in names]
        assert {each["pid"] for each in mine} == set(running.children())
        assert [(each["state"], each["resident"], each["loads"]) for each in mine] == [("ready", True, 1)] * 2
        running.interrupt()
        assert running.process.wait(30.0) == 0
    assert [each for each in json.loads(shell.run("worker", "ls", "--json").out) if each["service"] in names] == []


@pytest.mark.parametrize("when", ["at rest", "in a swap"])
def test_a_drain_settles_what_is_held_and_leaves_no_worker(url: str, tmp_path: Path, base: int, when: str) -> None:
    names = ("Small", "Middle")
    with (
        pool_of(url, tmp_path, heavy(*names), limit_of(base, names), residence_s=0.0) as pool,
        pool.sites[0].ledger() as one,
        pool.sites[1].ledger() as two,
    ):
        pool.settled(1)
        if when == "in a swap":
            one.send([[f"{number}"] for number in range(500)])
            two.send([[f"{number}"] for number in range(500)])
            eventually(lambda: "evicting" in pool.states() or "loading" in pool.states())
        began = time.monotonic()
        pool.supervision.end()

        assert time.monotonic() - began < 15.0
        assert [site.watch.held() for site in pool.sites] == [[], []]
        assert [site.watch.live() for site in pool.sites] == [{}, {}]
        assert pool.supervision.supervisor.restarts == 0
