"""State of a route's canary: the plan that runs, its step, the weights in effect, and what it is judged from. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from millstream.broker.config.canary import CanaryPlan
from millstream.broker.contract.errors import Malformed
from millstream.broker.queue.canary_sample import Sample

Status = Literal["running", "promoted", "rolled_back"]

STATUSES: tuple[Status, ...] = ("running", "promoted", "rolled_back")


@dataclass(frozen=True, slots=True)
class CanaryState:
    """A canary of one route. `run` is its random id.

    `weights` are in effect, `before` are those that a roll back restores. `step` is an index of the plan's steps. It
    began at `since`, server ms, when the totals of the new version were `new` and those of the others `old`. `others`
    is what the others did in the step before, None in the first. `reason` says why it was rolled back.
    """

    run: str
    plan: CanaryPlan
    weights: Mapping[str, float]
    before: Mapping[str, float]
    since: int
    new: Sample
    old: Sample
    others: Sample | None = None
    status: Status = "running"
    step: int = 0
    reason: str = ""

    @property
    def is_running(self) -> bool:
        """Whether it has steps before it."""
        return self.status == "running"

    def to_json(self) -> str:
        """Returns the state for the server."""
        return json.dumps({each.name: _plain(getattr(self, each.name)) for each in fields(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> CanaryState:
        """Returns the state in a record. Raises Malformed."""
        try:
            record = json.loads(text)
            known = {each.name: record[each.name] for each in fields(cls) if each.name in record}
            for name in ("new", "old", "others"):
                known[name] = Sample.from_record(known[name]) if known.get(name) else None
            if known["new"] is None or known["old"] is None:
                raise ValueError("no totals")
            weights = {version: float(weight) for version, weight in known["weights"].items()}
            return cls(**{**known, "weights": weights, "plan": CanaryPlan.model_validate(known["plan"])})
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise Malformed(f"the state of a canary cannot be read: {type(error).__name__}") from error


def _plain(value: object) -> object:
    if isinstance(value, CanaryPlan):
        return value.model_dump()
    return value.to_record() if isinstance(value, Sample) else value
