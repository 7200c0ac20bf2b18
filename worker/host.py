"""Runs the lanes of one worker process: starts them, gives the device to one of them at a time, drains them.

The device is the main thread's. One lane has it always, and its loop sleeps in its own window. Several lanes take turns
of one step each; DeviceTurn decides whose turn it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from millstream.worker.engines.runner import Runner
from millstream.worker.scheduling.device_turn import DeviceTurn


class Lane(Protocol):
    """One service in this process."""

    runner: Runner

    def wake_by(self, wake: Callable[[], None]) -> None:
        """Stores `wake`, to be called when the runner may have work, and when it has drained."""
        ...

    def start(self) -> None:
        """Starts its threads."""
        ...

    def drain(self) -> None:
        """Ends its threads in order, after its runner has drained."""
        ...

    def stop(self) -> None:
        """Makes its threads end soon."""
        ...

    def await_settled(self) -> None:
        """Waits a short time until its finished answers are written."""
        ...


def run(lanes: Sequence[Lane]) -> None:
    """Works until the process drains. Raises ThreadFailed."""
    try:
        share = DeviceShare(lanes) if len(lanes) > 1 else None
        for lane in lanes:
            lane.start()
        if share:
            share.run()
        else:
            lanes[0].runner.run()
        for lane in lanes:
            lane.drain()
    finally:
        for lane in lanes:
            lane.stop()
        for lane in lanes:
            lane.await_settled()


class DeviceShare:
    """The turns of several lanes."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._runners = [lane.runner for lane in lanes]
        self._turn = DeviceTurn(len(lanes))
        self._last: Runner | None = None
        self._awake = threading.Event()
        for lane in lanes:
            lane.wake_by(self._awake.set)

    def run(self) -> None:
        """Gives turns until every lane has drained."""
        while True:
            # Before the lanes are asked: work that arrives meanwhile is then seen by `wait`.
            self._awake.clear()
            if self.step():
                continue
            if all(runner.drained for runner in self._runners):
                return
            self._awake.wait()

    def step(self) -> bool:
        """Gives one turn to the lane that comes next. Returns whether any lane had work."""
        place = self._turn.next([runner.work for runner in self._runners], time.monotonic())
        if place is None:
            return False
        runner = self._runners[place]
        start = time.monotonic()
        if runner is not self._last:
            runner.use_threads()
            self._last = runner
        runner.turn()
        now = time.monotonic()
        self._turn.end(place, now - start, now)
        return True
