"""Several lanes in one process: one has the device at a time, and neither time nor deaths count for the others."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import pytest
from contracts.held import NOW, claim_of
from support import eventually

from millstream.broker.contract.job import Json, Priority, Vectors
from millstream.worker import host
from millstream.worker.context import Context
from millstream.worker.engines.base import Step
from millstream.worker.engines.one_shot import OneShot
from millstream.worker.engines.runner import Runner
from millstream.worker.host import DeviceShare
from millstream.worker.intake.settler import Finished
from millstream.worker.models.base import Prepared
from millstream.worker.models.echo import EchoModel
from millstream.worker.models.echo_stream import EchoStreamModel
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.shutdown import ThreadFailed
from millstream.worker.stage_gate import Stage as StageWrapper
from millstream.worker.stage_gate import StageGate
from millstream.worker.supervision.progress import Snapshot, Stage
from millstream.worker.window import Window

LONG_S = 10.0


class Watched(EchoModel):
    """Echo; calls `on_forward` in each forward."""

    on_forward: Callable[[], object] = staticmethod(lambda: None)

    def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json]:
        self.on_forward()
        return super().forward(rows)


class Bench:
    """A lane without threads: a window, a runner, and the answers."""

    def __init__(self, model: EchoModel | EchoStreamModel, stage: StageWrapper | None = None) -> None:
        self.model = model
        self.window = Window(Budget(rows=4, tokens=1_000))
        self.context = Context("w1", self.window, stage=stage)
        self.context.clock.set_to(NOW)
        track = self.context.progress.runner
        engine = model.start_engine() if isinstance(model, EchoStreamModel) else OneShot(model, track.lap)
        self.runner = Runner(self.context, engine, self.finish)
        self.finished: list[Finished] = []
        self.calls: list[str] = []

    def finish(self, finished: Finished) -> None:
        self.finished.append(finished)

    def send(self, *texts: str, priority: Priority = Priority.NORMAL) -> list[ActiveJob]:
        jobs = []
        for text in texts:
            claim = claim_of([text], priority=priority)
            assert claim.job
            jobs.append(ActiveJob(claim, claim.job, self.model.prepare([text], {})))
        self.window.hold(jobs)
        return jobs

    @property
    def answers(self) -> list[Json]:
        return [value for each in self.finished for value in each.reply.values or ()]

    @property
    def stages(self) -> list[Snapshot]:
        return self.context.progress.snapshots()

    def wake_by(self, wake: Callable[[], None]) -> None:
        self.window.wake = wake

    def start(self) -> None:
        self.calls.append("start")

    def drain(self) -> None:
        self.calls.append("drain")
        self.context.shutdown.check()

    def stop(self) -> None:
        self.calls.append("stop")

    def await_settled(self) -> None:
        self.calls.append("await_settled")


def share_of(*lanes: Bench) -> DeviceShare:
    share = DeviceShare(len(lanes))
    for place, lane in enumerate(lanes):
        share.put(place, lane)
    return share


@contextmanager
def running(*lanes: Bench) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=host.run, args=(lanes,), daemon=True)
    thread.start()
    yield thread
    for lane in lanes:
        lane.window.close()
    thread.join(LONG_S)
    assert not thread.is_alive()


def test_work_that_comes_while_the_loop_sleeps_is_done_in_either_lane() -> None:
    one, two = Bench(EchoModel()), Bench(EchoModel())

    with running(one, two):
        for number in range(50):
            (one if number % 3 else two).send(f"text {number}")
            eventually(lambda number=number: len(one.answers) + len(two.answers) > number)  # type: ignore[misc]

    assert sorted(map(str, one.answers + two.answers)) == sorted(f"text {number}" for number in range(50))
    assert "text 3" in two.answers
    assert one.calls == two.calls == ["start", "drain", "stop", "await_settled"]


def test_the_process_works_until_the_last_lane_has_drained() -> None:
    one, two = Bench(EchoModel()), Bench(EchoModel())

    with running(one, two) as thread:
        one.window.close()
        two.send("late")
        eventually(lambda: two.answers == ["late"])
        assert thread.is_alive()


def test_a_single_lane_keeps_the_loop_that_sleeps_in_its_window() -> None:
    lane = Bench(EchoModel())

    with running(lane):
        lane.send("a", "b")
        eventually(lambda: lane.answers == ["a", "b"])
        assert lane.window.wake is None


def test_only_the_lane_that_has_the_device_is_on_its_page() -> None:
    one, two = Bench(Watched()), Bench(EchoStreamModel())
    seen: list[list[Snapshot]] = []
    one.model.on_forward = lambda: seen.append(two.stages)  # type: ignore[union-attr]
    share = share_of(one, two)
    (job,) = two.send("a b c d e f g h")
    share.step()
    assert job.started_at

    one.send("urgent", priority=Priority.REALTIME)
    while not one.answers:
        share.step()

    assert seen == [[]]
    step, stages = two.runner._engine.step, list[Snapshot]()

    def watched_step() -> Step:
        stages.extend(two.stages)
        return step()

    two.runner._engine.step = watched_step  # type: ignore[method-assign]
    while two.runner.urgency is not None:
        assert share.step()
        assert two.stages == []
    assert [(each.stage, each.entries) for each in stages] == [(Stage.RUN, [job.name])] * 7
    assert [dict(answer)["text"] for answer in two.answers] == ["a b c d e f g h"]  # type: ignore[arg-type]


def test_rows_that_lost_the_device_spend_no_inference_time_and_go_on_where_they_were() -> None:
    one, two = Bench(EchoModel("sleep:0.2")), Bench(EchoStreamModel("sleep:0.001"))
    share = share_of(one, two)
    (job,) = two.send("a b c d e f g h")
    share.step()
    assert job.started_at

    one.send("urgent", priority=Priority.REALTIME)
    while not one.answers:
        share.step()

    # In the model since its start, but for the other lane's forward.
    assert job.running_since is None
    assert job.in_model_s(time.monotonic()) == job.in_model_s(time.monotonic()) < 0.1
    while not two.answers:
        share.step()
    timings = two.finished[0].reply.timings
    assert timings["inference"] < 150


def test_the_more_urgent_lane_is_served_first() -> None:
    one, two = Bench(Watched()), Bench(Watched())
    order: list[str] = []
    one.model.on_forward = lambda: order.append("one")  # type: ignore[union-attr]
    two.model.on_forward = lambda: order.append("two")  # type: ignore[union-attr]
    share = share_of(one, two)
    one.send(*["batch"] * 8, priority=Priority.BATCH)
    two.send(*["urgent"] * 4, priority=Priority.REALTIME)

    while share.step():
        pass

    assert order[0] == "two"
    assert sorted(order) == ["one", "one", "two"]


def test_lanes_of_one_urgency_take_turns() -> None:
    one, two = Bench(Watched("sleep:0.002")), Bench(Watched("sleep:0.002"))
    order: list[int] = []
    one.model.on_forward = lambda: order.append(1)  # type: ignore[union-attr]
    two.model.on_forward = lambda: order.append(2)  # type: ignore[union-attr]
    share = share_of(one, two)
    one.send(*["text"] * 40)
    two.send(*["text"] * 40)

    while share.step():
        pass

    assert all(before != after for before, after in pairwise(order))


def test_rows_that_are_set_aside_are_no_work_until_the_suspects_are_settled() -> None:
    one, two = Bench(EchoModel()), Bench(EchoModel())
    share = share_of(one, two)
    one.send("innocent")

    with one.window.set_aside():
        assert not share.step()
        two.send("other")
        assert share.step()
        assert (one.answers, two.answers) == ([], ["other"])

    assert share.step()
    assert one.answers == ["innocent"]


def test_a_suspect_runs_while_no_other_lane_is_in_a_stage() -> None:
    gate, model, alone = StageGate(), Watched(), list[str | None]()
    lane = Bench(model, partial(gate.stage, "one"))
    share = share_of(lane)
    model.on_forward = lambda: alone.append(gate._alone)
    for _ in range(2):
        (job,) = lane.send("text")
        share.step()
        lane.window.keep([], suspects=[job.name])
        lane.window.hold([job])
        share.step()
        lane.window.forget([job.name])

    assert alone == [None, "one", None, "one"]
    assert not lane.window.has_suspect([job.name])


def test_a_lane_that_fails_ends_all_and_each_may_settle_what_it_finished() -> None:
    one, two = Bench(EchoModel()), Bench(EchoModel())
    with two.context.shutdown.guard():
        raise RuntimeError("a thread of this lane")
    for lane in (one, two):
        lane.window.close()

    with pytest.raises(ThreadFailed, match="a thread of this lane"):
        host.run([one, two])

    assert [lane.calls[-2:] for lane in (one, two)] == [["stop", "await_settled"]] * 2


def test_a_lane_that_is_removed_is_referred_to_by_no_running_turn() -> None:
    one, two = Bench(Watched()), Bench(EchoModel())
    share = share_of(one, two)
    one.send("a")
    two.send("b")
    while share.step():
        pass
    found: list[object] = []
    gone = weakref.ref(two.runner)

    def remove() -> None:
        share.remove(1)
        two.runner = None  # type: ignore[assignment]
        gc.collect()
        found.append(gone())

    one.model.on_forward = remove  # type: ignore[union-attr]
    one.send("c")
    assert share.step()

    assert found == [None]


def test_threads_get_the_device_in_the_order_in_which_they_ask() -> None:
    share, order = DeviceShare(0), list[int]()

    def use(number: int) -> None:
        with share.device():
            order.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(5)]
    with share.device():
        for number, thread in enumerate(threads, 1):
            thread.start()
            eventually(lambda number=number: share._device._asked == number + 1)  # type: ignore[misc]
    for thread in threads:
        thread.join()

    assert order == [0, 1, 2, 3, 4]
