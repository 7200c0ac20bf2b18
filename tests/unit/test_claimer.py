"""A claimer keeps its window filled, and less urgent work moving; it lets realtime jobs past a window that is full."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import fakeredis
import pytest
from contracts.queue import Queue, draft
from support import eventually

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import PRIORITIES, Draft, Json, Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.claims import ClaimBudget, Claimed
from millstream.broker.queue.pause import pause
from millstream.broker.queue.streams import Streams
from millstream.worker.context import Context
from millstream.worker.intake import claimer
from millstream.worker.intake.claimer import Claimer, Policy
from millstream.worker.intake.intake import Intake
from millstream.worker.intake.settler import Finished
from millstream.worker.models.base import Prepared
from millstream.worker.models.echo import EchoModel
from millstream.worker.scheduling import claim_policy
from millstream.worker.scheduling.batch_delay import BatchDelay
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.scheduling.batches import HOLD_BATCHES
from millstream.worker.scheduling.claim_policy import LONGEST_WAIT_S, SHORTEST_WAIT_S
from millstream.worker.scheduling.fair_share import FairShare
from millstream.worker.stage_gate import Stage as StageWrapper
from millstream.worker.stage_gate import StageGate
from millstream.worker.window import Window

LONG_S = 20.0

ROWS = 4
"""Rows of a micro-batch, each a job of its own."""


SOMETHING_IS_LEFT = Claimed(now=0, waiting=(0, 1, 0))


class Scripted(Streams):
    """Before each sleep one of `wakes` happens, until they are used up."""

    def __init__(self, client: fakeredis.FakeRedis, keys: ServiceKeys, wakes: Sequence[Callable[[], object]]) -> None:
        super().__init__(client, keys)
        self.claims = self.sleeps = 0
        self.used_up = False
        self._wakes = iter(wakes)

    def claim(self, consumer: str, limit: ClaimBudget) -> Claimed:
        self.claims += 1
        return super().claim(consumer, limit)

    def wait(self, consumer: str, wait_s: float, limit: ClaimBudget) -> Claimed:
        wake = next(self._wakes, None)
        if wake is None:
            self.used_up = True
            return SOMETHING_IS_LEFT
        self.sleeps += 1
        wake()
        return super().wait(consumer, 0.001, limit)


class Bench:
    """A claimer on a queue of its own; the test is its runner and its settler."""

    def __init__(
        self,
        fair_share: dict[Priority, float],
        wakes: Sequence[Callable[[Bench], object]] = (),
        batch_delay: BatchDelay | None = None,
        beside: Bench | None = None,
        *,
        supervised: bool = False,
        stage: StageWrapper | None = None,
    ) -> None:
        """A worker of a queue of its own, or of that of the one `beside` it."""
        self.server: fakeredis.FakeServer = beside.server if beside else fakeredis.FakeServer()
        client = fakeredis.FakeRedis(server=self.server, protocol=2)
        self.queue = Queue(client, ServiceKeys("echo"))
        self.queue.open()
        self.context = Context("w2" if beside else "w1", Window(Budget(ROWS, tokens=1_000)), stage=stage)
        self.finished: list[Finished] = []
        self.model = EchoModel("echo")
        self.streams: Scripted = Scripted(client, self.queue.keys, [partial(wake, self) for wake in wakes])
        self.claimer = Claimer(
            self.context,
            claimer.Queue(self.streams, self.queue.lease),
            Intake(self.model, max_attempts=3),
            Policy(
                batch_delay or BatchDelay(0.0),
                dict.fromkeys(PRIORITIES, LONG_S),
                FairShare(fair_share, 2 * ROWS),
                supervised,
            ),
            self.finished.append,
        )

    def put(self, priority: Priority, jobs: int) -> None:
        self.queue.put(*[draft() for _ in range(jobs)], priority=priority)

    def claim(self) -> None:
        """Steps of the claimer up to its next claim."""
        claims = self.streams.claims
        while self.streams.claims == claims:
            self.claimer._step()

    def run_one(self) -> list[Priority]:
        """One micro-batch, run and settled: of which priority its jobs were."""
        window = self.context.window
        batch = window.take()
        done = window.complete(batch, ["done"] * len(batch))
        addresses = [held.claim.address for held in done]
        self.queue.settle([held.claim for held in done])
        window.forget([address.name for address in addresses])
        return [address.priority for address in addresses]


SHARES = {Priority.REALTIME: 0.7, Priority.NORMAL: 0.2, Priority.BATCH: 0.1}


@pytest.fixture
def bench() -> Bench:
    return Bench(SHARES)


@pytest.mark.parametrize("urgent", [Priority.REALTIME, Priority.NORMAL])
def test_a_more_urgent_job_passes_a_window_that_is_full_of_batch_rows_and_nothing_else_does(
    bench: Bench, urgent: Priority
) -> None:
    bench.put(Priority.BATCH, 100)
    bench.claimer.start()
    eventually(lambda: bench.context.window.room(1) is None)
    bench.put(urgent, 1)

    eventually(lambda: bench.context.window.waiting_of(urgent) == 1)
    in_hand = len(bench.context.window.names())
    first = bench.run_one()
    bench.context.shutdown.drain()
    bench.claimer.join()

    bench.context.shutdown.check()
    assert first == [urgent]
    assert in_hand == HOLD_BATCHES * ROWS + 1


def test_a_realtime_job_that_has_no_room_in_a_window_that_is_nearly_full_passes_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = bench.context.window
    monkeypatch.setattr(window, "wait_for_take", lambda timeout: False)
    bench.put(Priority.BATCH, HOLD_BATCHES * ROWS - 1)
    bench.claim()
    assert (room := window.room(1)) is not None
    assert room.rows == 1
    bench.queue.put(draft(rows=2), priority=Priority.REALTIME)

    bench.claim()
    bench.claim()

    assert window.waiting_of(Priority.REALTIME) == 2
    assert bench.run_one() == [Priority.REALTIME]


@pytest.mark.parametrize(("left_s", "waits_s"), [(0.0, SHORTEST_WAIT_S), (0.04, 0.03), (3600.0, LONGEST_WAIT_S)])
def test_a_busy_worker_looks_the_oftener_the_sooner_its_forward_is_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, left_s: float, waits_s: float
) -> None:
    window = bench.context.window
    waits: list[float] = []
    monkeypatch.setattr(window, "wait_for_take", waits.append)
    monkeypatch.setattr(Window, "forward_left_s", left_s)
    bench.put(Priority.NORMAL, 2 * ROWS)
    # Claims them all, and has room for more.
    bench.claim()
    window.take()

    bench.claim()
    bench.claim()

    assert waits == [pytest.approx(waits_s)]


def test_until_a_take_makes_room_for_the_next_job_only_others_are_looked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.context.window, "wait_for_take", lambda timeout: False)
    asked: list[int] = []
    claim = bench.streams.claim

    def noted(consumer: str, limit: ClaimBudget) -> Claimed:
        asked.append(limit.streams)
        return claim(consumer, limit)

    monkeypatch.setattr(bench.streams, "claim", noted)
    window = bench.context.window
    bench.put(Priority.BATCH, 1)
    (lost,) = bench.queue.claim("w0").claims
    fitting = HOLD_BATCHES * ROWS // (ROWS - 1)
    bench.queue.put(*[draft(rows=ROWS - 1) for _ in range(fitting + 1)], priority=Priority.BATCH)

    bench.claim()
    bench.claim()
    assert (asked, len(window.names())) == ([3, 2], fitting)
    bench.put(Priority.NORMAL, 1)
    bench.claim()
    assert (asked, len(window.names())) == ([3, 2, 2], fitting + 1)
    bench.queue.lease.release("w0")
    bench.claim()
    assert lost.address.name in window.names()
    assert bench.run_one() == [Priority.NORMAL]
    bench.claim()
    assert asked == [3, 2, 2, 2, 3]


def test_no_class_starves_while_more_urgent_ones_saturate_the_worker(bench: Bench) -> None:
    served = dict.fromkeys(PRIORITIES, 0)

    for _ in range(80):
        for priority in PRIORITIES:
            bench.put(priority, max(0, 24 - len(bench.queue.jobs(priority))))
        bench.claim()
        for priority in bench.run_one():
            served[priority] += 1

    total = sum(served.values())
    assert served[Priority.NORMAL] >= 0.1 * total
    assert served[Priority.BATCH] >= 0.05 * total
    assert served[Priority.REALTIME] >= 0.5 * total


def test_a_worker_that_joins_is_left_what_waits_beyond_the_next_micro_batch_of_the_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Bench(SHARES, beside=bench)
    for each in (bench, other):
        monkeypatch.setattr(each.context.window, "wait_for_take", lambda timeout: False)
    bench.put(Priority.NORMAL, 5 * ROWS)
    bench.claim()
    assert len(bench.context.window.names()) == 5 * ROWS
    bench.claimer.live_workers = other.claimer.live_workers = 2

    # As a caller whose window follows the live workers: it sends as many again.
    bench.put(Priority.NORMAL, 5 * ROWS)
    bench.claim()
    assert len(bench.context.window.names()) == 5 * ROWS
    for _ in range(3):
        other.claim()
    assert len(other.context.window.names()) == 2.5 * ROWS

    ran = dict.fromkeys((bench, other), 0)
    while bench.queue.depth():
        for worker in (bench, other):
            ran[worker] += len(worker.run_one()) if worker.context.window.waiting else 0
            worker.claim()
    assert 0.4 <= ran[other] / sum(ran.values()) <= 0.6


def test_a_lone_worker_holds_a_full_window(bench: Bench) -> None:
    bench.put(Priority.NORMAL, 2 * HOLD_BATCHES * ROWS)

    bench.claim()

    assert len(bench.context.window.names()) == HOLD_BATCHES * ROWS


def test_a_suspect_does_not_starve_while_more_urgent_jobs_saturate_the_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = bench.context.window
    monkeypatch.setattr(window, "wait_for_take", lambda timeout: False)
    monkeypatch.setattr(window, "wait_until_empty", lambda timeout: False)
    bench.put(Priority.BATCH, 6)
    lost = bench.queue.claim("dead").claims
    bench.queue.lease.release("dead", started=[claim.address.name for claim in lost], gone=True)
    served: list[list[Priority]] = []

    for _ in range(100):
        bench.put(Priority.REALTIME, max(0, 60 - len(bench.queue.jobs(Priority.REALTIME))))
        # More often than the runner takes: it fills the window, unless it makes itself free.
        for _ in range(3):
            bench.claimer._step()
        served += [bench.run_one()] if window.waiting else []

    groups = [each for each in served if Priority.BATCH in each]
    assert groups == [[Priority.BATCH] * 2] * 3
    assert served[0] == [Priority.REALTIME] * ROWS


def with_a_full_window_and_suspects(bench: Bench, suspects: Priority) -> None:
    """The claimer runs, and six jobs of a worker that died are given back as suspects."""
    bench.put(suspects, 6)
    lost = bench.queue.claim("dead").claims
    bench.put(Priority.BATCH, 2 * HOLD_BATCHES * ROWS)
    bench.claimer.start()
    eventually(lambda: bench.context.window.room(1) is None)
    bench.queue.lease.release("dead", started=[claim.address.name for claim in lost], gone=True)


def sizes_served(bench: Bench, runs: int) -> list[int]:
    served = [len(bench.run_one()) for _ in range(runs)]
    bench.context.shutdown.drain()
    bench.claimer.join(LONG_S)
    bench.context.shutdown.check()
    return served


def test_suspects_run_alone_before_what_waits_in_a_supervised_worker() -> None:
    bench = Bench(SHARES, supervised=True)
    with_a_full_window_and_suspects(bench, Priority.BATCH)
    # A claim past the full window sees them.
    eventually(lambda: bench.claimer._last_claim.suspects == 3)

    served = sizes_served(bench, HOLD_BATCHES)

    # At most what the test takes before the claimer's own thread comes to it.
    assert served.index(2) <= 2
    assert served.count(2) == 3


def test_without_a_supervisor_suspects_wait_until_the_worker_is_free() -> None:
    bench = Bench(SHARES)
    with_a_full_window_and_suspects(bench, Priority.BATCH)

    assert sizes_served(bench, HOLD_BATCHES) == [ROWS] * HOLD_BATCHES


def test_suspects_do_not_pass_more_urgent_jobs_that_wait_in_a_supervised_worker() -> None:
    bench = Bench(SHARES, supervised=True)
    bench.put(Priority.REALTIME, 2 * ROWS)
    bench.claim()
    bench.put(Priority.BATCH, 1)
    (lost,) = bench.queue.claim("dead").claims
    bench.queue.lease.release("dead", started=[lost.address.name], gone=True)
    bench.claimer.start()
    eventually(lambda: bench.claimer._last_claim.suspects == 3)

    served = [bench.run_one() for _ in range(3)]
    bench.context.shutdown.drain()
    bench.claimer.join(LONG_S)

    assert served == [[Priority.REALTIME] * ROWS, [Priority.REALTIME] * ROWS, [Priority.BATCH]]


def test_suspects_do_not_wait_for_a_row_whose_answer_was_settled_elsewhere() -> None:
    bench = Bench(SHARES, supervised=True)
    bench.put(Priority.BATCH, ROWS)
    bench.claim()
    window = bench.context.window
    settled = window.names()[0]
    # Lost while this process was frozen, claimed anew, and then answered by what it had computed before.
    bench.queue.settle([window._jobs[settled].claim])
    window.forget([settled])
    bench.put(Priority.NORMAL, 1)
    (lost,) = bench.queue.claim("dead").claims
    bench.queue.lease.release("dead", started=[lost.address.name], gone=True)
    bench.claimer._last_claim = claim_policy.LastClaim(takes=0, suspects=2)
    bench.claimer.start()

    served = [bench.run_one() for _ in range(2)]
    bench.context.shutdown.drain()
    bench.claimer.join(LONG_S)

    assert served[0] == [Priority.NORMAL]
    assert len(served[1]) == ROWS


def test_the_share_of_suspects_pays_for_one_group_before_more_urgent_jobs() -> None:
    bench = Bench(SHARES, supervised=True)
    bench.put(Priority.BATCH, ROWS)
    bench.claim()
    bench.put(Priority.NORMAL, 6)
    for lost in bench.queue.claim("dead").claims:
        # One by one: each is a group of its own.
        bench.queue.lease.release("dead", started=[lost.address.name], only=[lost.address.name])
    bench.put(Priority.REALTIME, 3)
    bench.claimer._fair_share._saved[Priority.NORMAL] = float(ROWS)
    bench.claimer._last_claim = claim_policy.LastClaim(takes=0, suspects=2)
    bench.claimer.start()

    served = [bench.run_one() for _ in range(2)]
    bench.context.shutdown.drain()
    bench.claimer.join(LONG_S)

    assert served == [[Priority.NORMAL], [Priority.REALTIME] * 3]


@pytest.mark.parametrize("large", [draft(rows=HOLD_BATCHES * ROWS + 1), draft(tokens=10**8)], ids=["rows", "tokens"])
def test_a_job_larger_than_a_window_does_not_starve_while_more_urgent_jobs_saturate_the_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, large: Draft
) -> None:
    window = bench.context.window
    monkeypatch.setattr(window, "wait_for_take", lambda timeout: False)
    monkeypatch.setattr(window, "wait_until_empty", lambda timeout: False)
    bench.queue.put(large, priority=Priority.BATCH)
    served: list[list[Priority]] = []

    for _ in range(100):
        bench.put(Priority.REALTIME, max(0, 60 - len(bench.queue.jobs(Priority.REALTIME))))
        for _ in range(3):
            bench.claimer._step()
        served += [bench.run_one()] if window.waiting else []

    assert any(Priority.BATCH in each for each in served)
    assert served[:5] == [[Priority.REALTIME] * ROWS] * 5


def test_a_realtime_job_passes_a_window_of_bulk_while_a_realtime_suspect_waits(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = bench.context.window
    monkeypatch.setattr(window, "wait_for_take", lambda timeout: False)
    monkeypatch.setattr(window, "wait_until_empty", lambda timeout: False)
    bench.put(Priority.REALTIME, 1)
    (suspect,) = bench.queue.claim("dead").claims
    bench.put(Priority.BATCH, 2 * ROWS)
    bench.claimer._do(claim_policy.Claim(ClaimBudget(100, 100, 1_000)))
    bench.queue.lease.release("dead", started=[suspect.address.name], gone=True)
    bench.claim()
    bench.put(Priority.REALTIME, 1)

    served: list[list[Priority]] = []
    for _ in range(8):
        for _ in range(4):
            bench.claimer._step()
        served += [bench.run_one()] if window.waiting else []

    assert served == [[Priority.REALTIME], [Priority.BATCH] * ROWS, [Priority.BATCH] * ROWS, [Priority.REALTIME]]


def one_comes(bench: Bench) -> None:
    bench.put(Priority.NORMAL, 1)


def one_comes_and_one_is_given_back(bench: Bench) -> None:
    bench.queue.hold("w0", draft())
    bench.queue.lease.release("w0")
    one_comes(bench)


def one_comes_and_a_suspect_is_given_back(bench: Bench) -> None:
    claims = bench.queue.hold("w0", draft())
    bench.queue.lease.release("w0", started=[claim.address.name for claim in claims])
    one_comes(bench)


def one_comes_as_the_service_is_paused(bench: Bench) -> None:
    pause(bench.queue.client, bench.queue.keys)
    one_comes(bench)


def step_with_a_runner(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, until: Callable[[Bench], bool] = lambda bench: bench.streams.used_up
) -> int:
    """Steps of the claimer beside a runner that takes at once, up to `until`; how many jobs ran."""
    # As long as a loaded machine needs to let the runner take.
    monkeypatch.setattr(claim_policy, "SHORTEST_WAIT_S", LONG_S)
    monkeypatch.setattr(claim_policy, "LONGEST_WAIT_S", LONG_S)
    ran: list[Priority] = []

    def run() -> None:
        while served := bench.run_one():
            ran.extend(served)

    runner = threading.Thread(target=run)
    runner.start()
    while not until(bench):
        bench.claimer._step()
    bench.context.window.close()
    runner.join()
    return len(ran)


def test_jobs_that_come_one_by_one_to_an_idle_worker_cost_no_claim_more(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(SHARES, wakes=[one_comes] * 5)

    ran = step_with_a_runner(bench, monkeypatch)

    assert ran == 5
    # Before the first sleep.
    assert bench.streams.claims == 1


def test_what_was_given_back_runs_with_the_next_job_or_after_the_next_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(SHARES, wakes=[one_comes, one_comes_and_one_is_given_back])

    assert step_with_a_runner(bench, monkeypatch) == 3

    bench.queue.hold("w0", draft())
    bench.queue.lease.release("w0")
    bench.claim()

    assert len(bench.context.window.names()) == 1


def test_a_suspect_does_not_wait_for_as_long_as_jobs_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(SHARES, wakes=[one_comes_and_a_suspect_is_given_back, one_comes, one_comes])

    ran = step_with_a_runner(bench, monkeypatch, lambda bench: bool(bench.streams.sleeps) and not bench.queue.depth())

    assert ran == 2
    assert bench.streams.sleeps == 1


def test_a_pause_ends_what_follows_a_job_that_came_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(SHARES, wakes=[one_comes, one_comes_as_the_service_is_paused, one_comes])

    assert step_with_a_runner(bench, monkeypatch, lambda bench: bench.claimer.paused) == 1

    assert bench.queue.held_by(bench.context.consumer) == []


def one_with_a_minute_left(bench: Bench) -> None:
    bench.queue.put(draft(deadline=time.monotonic() + 60.0))


def test_a_job_that_wakes_a_worker_after_the_clock_stepped_back_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(SHARES, wakes=[one_with_a_minute_left])
    in_an_hour = bench.queue.lease.now() + 3_600_000
    # Heard before the first sleep, and then the clock steps.
    monkeypatch.setattr(bench.streams, "claim", lambda consumer, limit: Claimed(in_an_hour))

    assert step_with_a_runner(bench, monkeypatch) == 1
    assert bench.finished == []


class Counted(BatchDelay):
    """Always hopes, for a moment; counts how often it was asked."""

    asked = 0

    def wait_s(self, since_first_s: float, since_last_s: float = 0.0) -> float:
        self.asked += 1
        return 0.001 if self.asked < 3 else 0.0


@pytest.mark.parametrize(("forward_s", "claims"), [(0.0001, 1), (0.01, 3)])
def test_company_is_waited_for_only_where_a_forward_takes_longer(forward_s: float, claims: int) -> None:
    bench = Bench(SHARES, batch_delay=Counted(LONG_S))
    bench.context.window.cost.smallest_s = forward_s
    bench.put(Priority.NORMAL, 1)

    bench.claimer._step()

    assert bench.streams.claims == claims
    assert len(bench.context.window.names()) == 1


def test_a_suspect_is_prepared_while_no_other_lane_is_in_a_stage() -> None:
    gate, alone = StageGate(), list[str | None]()
    bench = Bench(SHARES, stage=partial(gate.stage, "one"))
    prepare = bench.model.prepare

    def watched_prepare(inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        alone.append(gate._alone)
        return prepare(inputs, options)

    bench.model.prepare = watched_prepare  # type: ignore[method-assign]
    bench.put(Priority.NORMAL, 1)
    (suspect,) = bench.queue.claim("dead").claims
    bench.queue.lease.release("dead", started=[suspect.address.name], gone=True)

    bench.claim()
    bench.run_one()
    bench.put(Priority.NORMAL, 1)
    bench.claim()

    assert alone == ["one", None]
