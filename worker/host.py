"""Runs the lanes of one worker process: starts them, gives the device to one of them at a time, drains them.

The device is the main thread's. One lane has it always, and its loop sleeps in its own window. Several lanes take turns
of one step each; DeviceTurn decides whose turn it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from millstream.worker.engines.runner import Runner
from millstream.worker.scheduling.device_turn import DeviceTurn

LOOK_S = 0.5
"""Seconds between two checks whether a process without work drains."""


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
        share = DeviceShare(len(lanes)) if len(lanes) > 1 else None
        for place, lane in enumerate(lanes):
            if share:
                share.put(place, lane)
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
    """The turns of lanes at `count` places; thread-safe, but for `run` and `step`.

    `draining`: whether the process drains. A place without a lane belongs to a model that is not in memory.
    """

    def __init__(self, count: int, draining: Callable[[], bool] = lambda: True) -> None:
        self._lanes: list[Lane | None] = [None] * count
        self._turn = DeviceTurn(count)
        self._draining = draining
        self._last: Runner | None = None
        self._awake = threading.Event()
        self._changes = threading.Lock()
        self._device = Queue()
        self._ended = False

    def put(self, place: int, lane: Lane) -> bool:
        """Lets `lane` take turns. Returns False, and changes nothing, if the process has ended its turns."""
        with self._changes:
            if self._ended:
                return False
            lane.wake_by(self._awake.set)
            self._lanes[place] = lane
            self._awake.set()
            return True

    def remove(self, place: int) -> Lane | None:
        """Takes the lane away after its runner has drained; None if it is not there."""
        with self._changes:
            lane, self._lanes[place] = self._lanes[place], None
            if lane and lane.runner is self._last:
                self._last = None
            return lane

    @contextmanager
    def device(self) -> Iterator[None]:
        """Gives the device to the calling thread: after the running turn, and before any turn that begins later."""
        with self._device:
            yield

    def run(self) -> None:
        """Gives turns until the process drains and every lane has drained."""
        while True:
            # Before the lanes are asked: work that arrives meanwhile is then seen by `wait`.
            self._awake.clear()
            if self.step():
                continue
            if self._end():
                return
            self._awake.wait(LOOK_S)

    def step(self) -> bool:
        """Gives one turn to the lane that comes next. Returns whether any lane had work."""
        place = self._turn.next([lane.runner.work if lane else None for lane in self._lanes], time.monotonic())
        lane = None if place is None else self._lanes[place]
        if place is None or lane is None:
            return False
        # Nothing here refers to the other lanes during this turn: one that is removed meanwhile must free its memory.
        runner = lane.runner
        with self._device:
            start = time.monotonic()
            if runner is not self._last:
                runner.use_threads()
                self._last = runner
            runner.turn()
            now = time.monotonic()
        self._turn.end(place, now - start, now)
        return True

    def _end(self) -> bool:
        with self._changes:
            self._ended = self._draining() and all(lane is None or lane.runner.drained for lane in self._lanes)
            return self._ended


class Queue:
    """A lock that threads get in the order in which they asked for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = self._served = 0

    def __enter__(self) -> None:
        with self._changed:
            number = self._asked
            self._asked += 1
            self._changed.wait_for(lambda: self._served == number)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()
