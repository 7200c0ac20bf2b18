"""The model of fair shares between tenants: whose job is next, in one priority of a service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

Job = tuple[str, int]
"""Id and tokens of a job."""


@dataclass
class Shares:
    """Virtual times: tokens that a tenant was given, by its weight. `served` is the time that was served last.

    `in_flight` counts the jobs of each tenant that were taken, of all priorities: `most` at a time.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    waiting: dict[str, list[Job]] = field(default_factory=dict)
    turn: dict[str, float] = field(default_factory=dict)
    past: dict[str, float] = field(default_factory=dict)
    served: float = 0.0
    in_flight: Counter[str] = field(default_factory=Counter)
    most: int = 10**9

    def add(self, tenant: str, job: Job) -> None:
        self.waiting.setdefault(tenant, []).append(job)
        self.turn.setdefault(tenant, max(self.past.get(tenant, 0.0), self.served))

    def remove(self, tenant: str, job_id: str) -> None:
        """A job that waited is cancelled. It may be one that was not added."""
        self.waiting[tenant] = [job for job in self.waiting.get(tenant, ()) if job[0] != job_id]
        self._forget_turns_of_nobody()

    def take(self) -> str | None:
        """The next job."""
        while able := [tenant for tenant in self.turn if self.in_flight[tenant] < self.most]:
            tenant = min(able, key=lambda each: (self.turn[each], each))
            time = self.turn[tenant]
            if self.waiting[tenant]:
                job_id, tokens = self.waiting[tenant].pop(0)
                self.served = time
                self.in_flight[tenant] += 1
                self.turn[tenant] = time + tokens / self.weights.get(tenant, 1.0)
                if not self.waiting[tenant]:
                    self.past[tenant] = self.turn.pop(tenant)
                self._forget_turns_of_nobody()
                return job_id
            self.past[tenant] = self.turn.pop(tenant)
        return None

    def come_back(self, tenant: str) -> None:
        """One of its jobs is settled. A tenant that had as many in flight as it may has nothing to catch up."""
        if tenant in self.turn:
            self.turn[tenant] = max(self.turn[tenant], self.served)

    def _forget_turns_of_nobody(self) -> None:
        if not any(self.waiting.values()):
            self.past |= self.turn
            self.turn.clear()

    def order(self) -> Iterator[str]:
        """Jobs in the order in which they would be taken now, until no tenant may have more in flight."""
        copy = deepcopy(self)
        while (job_id := copy.take()) is not None:
            yield job_id
