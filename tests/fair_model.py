"""The model of fair shares between tenants: whose job is next, in one priority of a service."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

Job = tuple[str, int]
"""Id and tokens of a job."""


@dataclass
class Shares:
    """Virtual times: tokens that a tenant was given, by its weight. `served` is the time that was served last."""

    weights: Mapping[str, float] = field(default_factory=dict)
    waiting: dict[str, list[Job]] = field(default_factory=dict)
    turn: dict[str, float] = field(default_factory=dict)
    past: dict[str, float] = field(default_factory=dict)
    served: float = 0.0

    def add(self, tenant: str, job: Job) -> None:
        self.waiting.setdefault(tenant, []).append(job)
        self.turn.setdefault(tenant, max(self.past.get(tenant, 0.0), self.served))

    def remove(self, tenant: str, job_id: str) -> None:
        """A job that waited is cancelled. It may be one that was not added."""
        self.waiting[tenant] = [job for job in self.waiting.get(tenant, ()) if job[0] != job_id]
        self._forget_turns_of_nobody()

    def take(self) -> str | None:
        """The next job."""
        while self.turn:
            tenant = min(self.turn, key=lambda each: (self.turn[each], each))
            time = self.turn[tenant]
            if self.waiting[tenant]:
                job_id, tokens = self.waiting[tenant].pop(0)
                self.served = time
                self.turn[tenant] = time + tokens / self.weights.get(tenant, 1.0)
                if not self.waiting[tenant]:
                    self.past[tenant] = self.turn.pop(tenant)
                self._forget_turns_of_nobody()
                return job_id
            self.past[tenant] = self.turn.pop(tenant)
        return None

    def _forget_turns_of_nobody(self) -> None:
        if not any(self.waiting.values()):
            self.turn.clear()

    def order(self) -> Iterator[str]:
        """All jobs, in the order in which they would be taken now."""
        copy = deepcopy(self)
        while (job_id := copy.take()) is not None:
            yield job_id
