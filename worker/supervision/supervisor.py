"""Starts worker processes, restarts those that die, and gives the jobs of dead ones back at once."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from millstream.broker.config.variables import URL_VARIABLE
from millstream.broker.contract.errors import ModelUnavailable
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.supervisors import Supervisors, SupervisorState
from millstream.broker.transport.connection import Connection, is_transient
from millstream.worker.measuring.cores import cores
from millstream.worker.measuring.threads import waiting
from millstream.worker.supervision.charging import End, give_back
from millstream.worker.supervision.child import Child
from millstream.worker.supervision.child_args import EXIT_PERMANENT, ChildArgs, Hosted, new_consumer
from millstream.worker.supervision.orders import Orders
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.progress import Progress
from millstream.worker.supervision.registrar import Registrar
from millstream.worker.supervision.slots import Slot, refusals, states, tally

log = logging.getLogger(__name__)

POLL_S = 0.1
"""Seconds between two checks of the children."""

DRAIN_S = 30.0
"""Seconds that a drain may take by default before children are killed."""

WITHDRAW_S = 2.0
"""Seconds at most that the end of a supervisor waits for a server that does not answer."""

CRASH_LOOP = 5
"""Early deaths in a row from which on restarts wait for the longest backoff."""

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 30.0

NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Death:
    """A dead child whose jobs of one service are not given back to the queue yet."""

    service: str
    consumer: str
    end: End


class Supervisor:
    """Keeps the planned processes alive until `drain`.

    Only `stop`, `kill` and the read-only properties may be used by other threads. `variables`: environment variables
    of the children, besides its own.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        plans: Sequence[Plan],
        *,
        drain_s: float = DRAIN_S,
        variables: Mapping[str, str] = NO_VARIABLES,
    ) -> None:
        self._url = url
        self._prefix = prefix
        self._drain_s = drain_s
        self._variables = variables
        self._connection = Connection(url, name="millstream-supervisor")
        self._slots = [Slot(plan, plan.device_of(index)) for plan in plans for index in range(plan.count)]
        self._deaths: list[Death] = []
        self._logged: set[tuple[str, str]] = set()
        specs = [spec for plan in plans for spec in plan.specs]
        self._orders = Orders(self._connection, prefix, {spec.name for spec in specs})
        self._registrar = Registrar(Registry(self._connection, prefix), specs, self._exchange)
        self._stopping = False
        self.restarts = 0

    def run(self) -> None:
        """Starts the processes, watches them until `stop`, then drains. Raises ModelUnavailable if none can start."""
        # Before the first worker starts: this host may be one that an operator keeps empty.
        self._orders.read()
        self._registrar.start()
        try:
            while not self._stopping:
                self.step()
                time.sleep(POLL_S)
        finally:
            self.drain()

    def stop(self) -> None:
        """Ends `run`. Takes no lock, so signal handlers may call it."""
        self._stopping = True

    def kill(self) -> None:
        """Kills all children at once, from any thread. No job is charged an attempt."""
        for child in [slot.child for slot in self._slots]:
            if child:
                child.kill("the drain was cut short")

    def step(self) -> None:
        """Checks every child once: starts missing ones, kills stuck ones, gives the jobs of dead ones back."""
        for slot in self._slots:
            self._look(slot)
        self._give_back()
        if all(slot.refused for slot in self._slots):
            raise ModelUnavailable("no worker process could start", hint="see the errors above")

    def _look(self, slot: Slot) -> None:
        slot.follow(self._orders, self._drain_s)
        if slot.child:
            slot.child.end_stuck()
            slot.child.note_ready()
        if slot.child and not slot.child.lives:
            self._handle_exit(slot, slot.child)
        elif slot.child and slot.child.steady:
            slot.failures = 0
        if not slot.child and not (slot.refused or slot.drained) and time.monotonic() >= slot.start_at:
            self._fill(slot)
        slot.ready = slot.child is not None and slot.child.ready
        slot.unready = slot.child.unready if slot.child else None

    @property
    def ready(self) -> int:
        return sum(1 for slot in self._slots if slot.ready)

    @property
    def size(self) -> int:
        return len(self._slots)

    @property
    def drained(self) -> int:
        """Number of places that an operator keeps empty."""
        return sum(1 for slot in self._slots if slot.drained)

    def tally(self) -> dict[str, tuple[int, int]]:
        """Service -> (ready processes, planned processes)."""
        return tally(self._slots)

    def refusals(self) -> dict[str, str]:
        """Service -> how its last worker ended, for the services that no worker is started for any more."""
        return refusals(self._slots)

    def states(self) -> dict[str, SupervisorState]:
        """Service -> what an operator should know of its workers here. Other threads may call it."""
        return states(self._slots)

    def _exchange(self) -> None:
        """Reads the orders of operators, and publishes the states."""
        self._orders.read()
        self._publish()

    def _publish(self) -> None:
        for name, state in self.states().items():
            Supervisors(self._connection.client, ServiceKeys(name, self._prefix)).publish(state)

    def _withdraw(self) -> None:
        """Removes its states, if the server is there. One that could start no worker leaves the reason."""
        if self._registrar.is_alive():
            self._registrar.join(WITHDRAW_S)
        for name, state in self.states().items():
            published = Supervisors(self._connection.client, ServiceKeys(name, self._prefix))
            try:
                if state.refused:
                    published.publish(state)
                else:
                    published.remove(state.host, state.pid)
            except Exception as error:  # noqa: BLE001 - only who looks sees a state that stays
                log.debug("the state of service %s stays on the server: %s", name, error)

    @property
    def pids(self) -> list[int]:
        """Pids of the children that were not waited for yet. Until then the system does not reuse a pid."""
        children = [slot.child for slot in self._slots]
        return [child.process.pid for child in children if child and child.process.returncode is None]

    def drain(self) -> None:
        """Lets every child settle its jobs, for at most `drain_s` seconds; kills the rest and gives their jobs back."""
        children = [slot.child for slot in self._slots if slot.child]
        for child in children:
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._drain_s
        while (alive := [child for child in children if child.lives]) and time.monotonic() < deadline:
            for child in alive:
                child.end_stuck()
            time.sleep(POLL_S)
        for child in alive:
            log.warning("worker %s did not drain in %g s: killed", child.consumer, self._drain_s)
            child.kill(f"it did not drain in {self._drain_s:g} s")
            child.await_end()
        for slot in self._slots:
            if slot.child:
                self._remove(slot, slot.child)
        self._give_back()
        if self._deaths:
            consumers = {death.consumer for death in self._deaths}
            log.warning("the server is away: the jobs of %d workers wait for the end of a lease", len(consumers))
        self._registrar.stop()
        self._withdraw()
        self._connection.close()

    def _fill(self, slot: Slot) -> None:
        try:
            slot.child = self._start(slot)
        except OSError as error:
            slot.failures += 1
            slot.past = f"could not be started ({error})"
            self._back_off(slot, f"service {slot.plan.services}: a worker")

    def _start(self, slot: Slot) -> Child:
        plan = slot.plan
        pages = {spec.name: Progress.create() for spec in plan.specs}
        consumer = slot.consumer = new_consumer()
        child_args = ChildArgs(
            hosted=[Hosted.of(spec, pages[spec.name].fd) for spec in plan.specs],
            prefix=self._prefix,
            consumer=consumer,
            device=slot.device,
            threads=max(1, cores() // len(self._slots)),
            past=slot.past,
            folder=plan.folder,
            drain_s=self._drain_s,
            pool=plan.pool,
        )
        try:
            # In a new session, so that Ctrl-C in the terminal reaches only the supervisor, which drains its children.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "millstream.worker.process", child_args.to_json()],
                stdin=subprocess.PIPE,
                pass_fds=[page.fd for page in pages.values()],
                env={**os.environ, **waiting(os.environ), **self._variables, URL_VARIABLE: self._url},
                start_new_session=True,
            )
        except OSError:
            for page in pages.values():
                page.close()
            raise
        return Child(consumer, process, pages)

    def _handle_exit(self, slot: Slot, child: Child) -> None:
        slot.past, failures = str(child.end), child.failures(slot.failures)
        service, reason = child.reason
        self._remove(slot, child)
        if child.process.returncode == EXIT_PERMANENT:
            self._refuse(slot, service, reason or slot.past)
            return
        if child.drain_until is not None:
            log.warning("worker %s %s, as an operator ordered", child.consumer, slot.past)
            return
        self.restarts += 1
        slot.failures = failures
        self._back_off(slot, f"worker {child.consumer}")

    def _refuse(self, slot: Slot, service: str, reason: str) -> None:
        """Starts no more children here, since they would fail again. Equal reasons of one service are logged once."""
        slot.refused = True
        message = (service, reason)
        if message not in self._logged:
            self._logged.add(message)
            log.error("service %s: %s", *message)

    def _back_off(self, slot: Slot, who: str) -> None:
        backoff = _backoff(slot.failures)
        slot.start_at = time.monotonic() + backoff
        log.warning("%s %s; the next starts in %g s", who, slot.past, backoff)
        if slot.failures == CRASH_LOOP:
            log.error(
                "service %s: %d workers in a row died early, the last one %s; retrying every %g s",
                slot.plan.services,
                CRASH_LOOP,
                slot.past,
                _LONGEST_BACKOFF_S,
            )

    def _remove(self, slot: Slot, child: Child) -> None:
        self._deaths += [Death(service, child.consumer, child.end_of(service)) for service in child.pages]
        child.close()
        slot.child, slot.ready, slot.unready = None, False, None

    def _give_back(self) -> None:
        """Gives the jobs of dead children back, at once or as soon as the server is back."""
        for death in list(self._deaths):
            lease = Lease(self._connection.client, ServiceKeys(death.service, self._prefix))
            try:
                returned = give_back(lease, death.consumer, death.end)
            except Exception as error:  # noqa: BLE001 - one service's broken keys must not affect the others
                if is_transient(error):
                    return
                log.error("the jobs of worker %s wait for the end of its lease: %s", death.consumer, error)
                returned = 0
            self._deaths.remove(death)
            if returned:
                log.warning("worker %s: its %d jobs are given back to the queue", death.consumer, returned)


def _backoff(failures: int) -> float:
    """Seconds until the next start: 0 after steady work, doubled with each early death, longest in a crash loop."""
    if failures >= CRASH_LOOP:
        return _LONGEST_BACKOFF_S
    return _FIRST_BACKOFF_S * 2 ** (failures - 1) if failures else 0.0
