"""Starts worker processes, starts them again when they die, and gives back at once what a dead one held."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from millstream.broker.config import ServiceSpec
from millstream.broker.connection import Connection, is_transient
from millstream.broker.errors import ModelUnavailable
from millstream.broker.keys import ServiceKeys
from millstream.broker.lease import Lease
from millstream.worker.models.source import locate
from millstream.worker.orders import EXIT_PERMANENT, URL_VARIABLE, Orders
from millstream.worker.progress import Progress, State

log = logging.getLogger(__name__)

POLL_S = 0.05
DRAIN_S = 30.0
STEADY_S = 30.0
CRASH_LOOP = 5
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 30.0
_LIBRARIES = ("torch", "sentence_transformers")
RUNNABLE = ("embedding", "echo")
"""The model types this version has a worker for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How many processes of a service to run here, each on `device` (None: the model's, or the best there is)."""

    spec: ServiceSpec
    count: int
    device: str | None = None

    def device_of(self, index: int) -> str | None:
        """Where the process number `index` of this plan runs: its devices in turn."""
        devices = (self.device,) if self.device else self.spec.model.devices or (self.spec.model.device,)
        return devices[index % len(devices)]


@dataclass(frozen=True, slots=True)
class Death:
    """What a dead child left behind, until it is given back to the queue."""

    service: str
    consumer: str
    started: Sequence[str]


@dataclass(slots=True, eq=False)
class Child:
    """One running worker process."""

    consumer: str
    process: subprocess.Popen[bytes]
    progress: Progress
    born: float

    @property
    def ready(self) -> bool:
        return self.process.poll() is None and self.progress.state == State.READY


@dataclass(slots=True, eq=False)
class Slot:
    """One place for a child: its plan, the child in it, and when the next may start after a death.

    `past` says how its last child ended. `ready` is what the last look found: other threads read it, and must not touch
    a child that may just be buried.
    """

    plan: Plan
    device: str | None
    child: Child | None = None
    past: str = ""
    ready: bool = False
    failures: int = 0
    start_at: float = 0.0
    refused: bool = False


def preflight(specs: Sequence[ServiceSpec]) -> None:
    """Check in milliseconds, without torch, what a worker could only find out in seconds. Raises ModelUnavailable."""
    for spec in specs:
        if spec.model.type not in RUNNABLE:
            raise ModelUnavailable(
                f"service {spec.name!r}: this version has no worker for models of type {spec.model.type!r}",
                hint=f"types that run today: {', '.join(RUNNABLE)}",
            )
        if spec.model.type == "embedding":
            _check_libraries(spec)
            locate(spec.model.model_name)


def _check_libraries(spec: ServiceSpec) -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelUnavailable(
            f"service {spec.name!r} needs {' and '.join(missing)}, not installed here",
            hint='pip install "millstream[worker]"',
        )


class Supervisor:
    """Keeps the planned processes alive until `drain`. Not thread-safe but for `stop` and the read-only properties."""

    def __init__(self, url: str, prefix: str, plans: Sequence[Plan], *, drain_s: float = DRAIN_S) -> None:
        self._url = url
        self._prefix = prefix
        self._drain_s = drain_s
        self._connection = Connection(url, name="millstream-supervisor")
        self._slots = [Slot(plan, plan.device_of(index)) for plan in plans for index in range(plan.count)]
        self._deaths: list[Death] = []
        self._stop = threading.Event()
        self.restarts = 0

    def run(self) -> None:
        """Start the processes, watch over them until `stop`, drain. Raises ModelUnavailable if none can start."""
        try:
            while not self._stop.is_set():
                self.step()
                self._stop.wait(POLL_S)
        finally:
            self.drain()

    def stop(self) -> None:
        """End `run` from a signal handler or another thread."""
        self._stop.set()

    def step(self) -> None:
        """One look at every child: start what is missing, bury what died."""
        for slot in self._slots:
            if slot.child:
                _end_stuck(slot.child, slot.plan.spec.runtime.stall_s)
            if slot.child and slot.child.process.poll() is not None:
                self._died(slot, slot.child)
            elif slot.child and slot.failures and time.monotonic() - slot.child.born > STEADY_S:
                slot.failures = 0
            if not slot.child and not slot.refused and time.monotonic() >= slot.start_at:
                slot.child = self._start(slot)
            slot.ready = slot.child is not None and slot.child.ready
        self._give_back()
        if all(slot.refused for slot in self._slots):
            raise ModelUnavailable("no worker process could start", hint="see the errors above")

    @property
    def ready(self) -> int:
        return sum(1 for slot in self._slots if slot.ready)

    @property
    def size(self) -> int:
        return len(self._slots)

    def tally(self) -> dict[str, tuple[int, int]]:
        """Service -> (processes that are ready, processes planned)."""
        counts: dict[str, tuple[int, int]] = {}
        for slot in self._slots:
            ready, planned = counts.get(slot.plan.spec.name, (0, 0))
            counts[slot.plan.spec.name] = (ready + slot.ready, planned + 1)
        return counts

    @property
    def pids(self) -> list[int]:
        """Of the children not yet waited for: until then the system gives a pid to nobody else."""
        children = [slot.child for slot in self._slots]
        return [child.process.pid for child in children if child and child.process.returncode is None]

    def drain(self) -> None:
        """Let every child settle what it holds, for at most `drain_s`; kill what is left and give back its jobs."""
        children = [slot.child for slot in self._slots if slot.child]
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._drain_s
        for child in children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("worker %s did not drain in %g s: killed", child.consumer, self._drain_s)
                child.process.kill()
                child.process.wait()
        for slot in self._slots:
            if slot.child:
                self._bury(slot, slot.child)
        self._give_back()
        self._connection.close()

    def _start(self, slot: Slot) -> Child:
        plan = slot.plan
        progress = Progress.create()
        consumer = f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"
        orders = Orders(
            service=plan.spec.name,
            prefix=self._prefix,
            consumer=consumer,
            device=slot.device,
            threads=max(1, len(os.sched_getaffinity(0)) // len(self._slots)),
            progress_fd=progress.fd,
            past=slot.past,
        )
        # A session of its own: Ctrl-C in the terminal reaches the supervisor alone, which drains its children.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "millstream.worker.process", orders.to_json()],
            stdin=subprocess.PIPE,
            pass_fds=[progress.fd],
            env={**os.environ, URL_VARIABLE: self._url},
            start_new_session=True,
        )
        return Child(consumer, process, progress, time.monotonic())

    def _died(self, slot: Slot, child: Child) -> None:
        code = child.process.returncode
        lived = time.monotonic() - child.born
        slot.past = _ended(child)
        self._bury(slot, child)
        if code == EXIT_PERMANENT:
            slot.refused = True
            return
        if code == 0 and self._stop.is_set():
            return
        slot.failures = 0 if lived > STEADY_S else slot.failures + 1
        backoff = _backoff(slot.failures)
        slot.start_at = time.monotonic() + backoff
        self.restarts += 1
        log.warning("worker %s %s; the next starts in %g s", child.consumer, slot.past, backoff)
        if slot.failures == CRASH_LOOP:
            log.error(
                "service %s: %d workers in a row died young, the last one %s; trying on, every %g s",
                slot.plan.spec.name,
                CRASH_LOOP,
                slot.past,
                _LONGEST_BACKOFF_S,
            )

    def _bury(self, slot: Slot, child: Child) -> None:
        self._deaths.append(Death(slot.plan.spec.name, child.consumer, child.progress.running()))
        if child.process.stdin:
            child.process.stdin.close()
        child.progress.close()
        slot.child, slot.ready = None, False

    def _give_back(self) -> None:
        """Release what the dead held: at once, or as soon as the server is back."""
        for death in list(self._deaths):
            lease = Lease(self._connection.client, ServiceKeys(death.service, self._prefix))
            try:
                returned = lease.release(death.consumer, started=death.started, gone=True)
            except Exception as error:
                if not is_transient(error):
                    raise
                return
            self._deaths.remove(death)
            if returned:
                log.warning("worker %s: %d jobs it held are given back to the queue", death.consumer, returned)


def _backoff(failures: int) -> float:
    """Seconds until the next start: none after a steady life, doubling with each early death, long in a crash loop."""
    if failures >= CRASH_LOOP:
        return _LONGEST_BACKOFF_S
    return _FIRST_BACKOFF_S * 2 ** (failures - 1) if failures else 0.0


def _end_stuck(child: Child, stall_s: float) -> None:
    """Kill a child whose forward has not ended for `stall_s`: whatever it waits for, its jobs can run elsewhere."""
    stuck_s = time.monotonic() - child.progress.stamp()
    if child.ready and child.progress.running() and stuck_s > stall_s:
        child.progress.last_words(f"no progress for {stuck_s:.1f} s, the stall_timeout is {stall_s:g} s")
        child.process.kill()
        child.process.wait()


def _ended(child: Child) -> str:
    """How a child ended, and why where it could say."""
    code = child.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    return f"{how} ({child.progress.reason})" if child.progress.reason else how
