"""The places of a supervisor for its children, and what operators should know of them."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millstream.broker.queue.supervisors import SupervisorState
from millstream.worker.measuring.cores import cores
from millstream.worker.supervision.child import Child
from millstream.worker.supervision.orders import Orders
from millstream.worker.supervision.plan import Plan

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Slot:
    """One place for a child: its plan, the child in it, and when the next may start after a death (monotonic seconds).

    `past`: how its last child ended. `ready`: whether the child was ready at the last check. Other threads read that
    field, since they must not touch a child that may be closed at the same time. `refused`: no child starts again.
    `consumer`: name of its last child. `drained`: an operator keeps it empty. `unready`: services of a living child
    whose models are not loaded yet, with the reason if a load failed; None without a child.
    """

    plan: Plan
    device: str | None
    child: Child | None = None
    past: str = ""
    ready: bool = False
    failures: int = 0
    start_at: float = 0.0
    refused: bool = False
    consumer: str = ""
    drained: bool = False
    unready: Mapping[str, str] | None = None

    def is_ready(self, service: str) -> bool:
        """Whether its child can work for `service`. A pool is ready for one though it cannot load another's model."""
        if self.plan.pool is None:
            return self.ready
        return self.unready is not None and service not in self.unready

    def follow(self, orders: Orders, drain_s: float) -> None:
        """Makes the child end if an operator orders it, and notes whether the place is to stay empty."""
        order = orders.find([spec.name for spec in self.plan.specs], self.consumer)
        if bool(order) != self.drained:
            self.drained = bool(order)
            self._log_drained(orders.host)
        if self.child and order:
            self.child.follow(order, drain_s)

    def _log_drained(self, host: str) -> None:
        """Logs the change of a place. A change of the host is logged for each place, since each has its own worker."""
        place = f"service {self.plan.services}: worker {self.consumer or 'to be started'} on {host}"
        if self.drained:
            log.warning("%s is kept away by an operator until `millstream worker start %s`", place, host)
        else:
            log.warning("%s: an operator lets it start again", place)


def tally(slots: Sequence[Slot]) -> dict[str, tuple[int, int]]:
    """Returns of each service (ready processes, planned processes)."""
    counts: dict[str, tuple[int, int]] = {}
    for slot in slots:
        for spec in slot.plan.specs:
            ready, planned = counts.get(spec.name, (0, 0))
            counts[spec.name] = (ready + slot.is_ready(spec.name), planned + 1)
    return counts


def refusals(slots: Sequence[Slot]) -> dict[str, str]:
    """Returns how the last worker ended of each service that no worker is started for any more."""
    going = {spec.name for slot in slots if not slot.refused for spec in slot.plan.specs}
    return {spec.name: slot.past for slot in slots for spec in slot.plan.specs if spec.name not in going}


def states(slots: Sequence[Slot]) -> dict[str, SupervisorState]:
    """Returns the state of each service's workers in these places."""
    refused, host, pid = refusals(slots), socket.gethostname(), os.getpid()
    found = {}
    for name, (ready, planned) in tally(slots).items():
        own = [slot for slot in slots if name in {spec.name for spec in slot.plan.specs}]
        worst = max(own, key=lambda slot: slot.failures)
        past, drained = worst.past if worst.failures else "", sum(slot.drained for slot in own)
        unloaded = next((why for slot in own if slot.plan.pool and (why := (slot.unready or {}).get(name))), "")
        found[name] = SupervisorState(
            host, pid, planned, ready, worst.failures, past, refused.get(name, ""), cores(), drained, unloaded
        )
    return found
