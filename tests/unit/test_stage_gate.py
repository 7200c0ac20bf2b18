"""While a suspect is in a stage, no other lane of its process is in any."""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack

from support import eventually

from millstream.worker.context import Context
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.stage_gate import StageGate
from millstream.worker.window import Window

LONG_S = 10.0


def entering(gate: StageGate, lane: str, alone: bool) -> tuple[threading.Event, threading.Event, threading.Thread]:
    """A thread that enters a stage; an event that says that it did, one that makes it leave."""
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with gate.stage(lane, alone):
            inside.set()
            leave.wait(LONG_S)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return inside, leave, thread


def test_stages_without_suspects_run_beside_each_other() -> None:
    gate = StageGate()

    with ExitStack() as stages:
        for lane in ("one", "two", "one"):
            stages.enter_context(gate.stage(lane, False))


def test_a_suspect_waits_for_other_lanes_and_they_wait_for_it() -> None:
    gate = StageGate()
    _, leave_first, _ = entering(gate, "one", False)

    inside, leave, _ = entering(gate, "two", True)
    eventually(lambda: gate._alone == "two")
    late, leave_late, _ = entering(gate, "one", False)

    assert not inside.wait(0.05)
    leave_first.set()
    assert inside.wait(LONG_S)
    assert not late.wait(0.05)
    leave.set()
    assert late.wait(LONG_S)
    leave_late.set()


def test_a_suspect_does_not_wait_for_its_own_lane() -> None:
    gate = StageGate()

    with gate.stage("one", False), gate.stage("one", True), gate.stage("one", False):
        pass
    with gate.stage("two", True):
        pass


def test_a_stage_that_raises_is_over() -> None:
    gate = StageGate()
    for alone in (True, False):
        try:
            with gate.stage("one", alone):
                raise KeyError
        except KeyError:
            pass

    with gate.stage("two", True):
        pass


def test_no_two_lanes_meet_while_a_suspect_is_in_a_stage_and_none_waits_for_ever() -> None:
    gate, lock = StageGate(), threading.Lock()
    inside: list[tuple[str, bool]] = []
    wrong: list[list[tuple[str, bool]]] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(100):
            me = chance.choice(("one", "two", "three")), chance.random() < 0.3
            with gate.stage(*me):
                with lock:
                    inside.append(me)
                    if len({lane for lane, _ in inside}) > 1 and any(alone for _, alone in inside):
                        wrong.append(list(inside))
                time.sleep(chance.random() / 10_000)
                with lock:
                    inside.remove(me)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)

    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_process_with_one_lane_has_no_gate() -> None:
    assert Context("w1", Window(Budget(1, 10))).stage is None
