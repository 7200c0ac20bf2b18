"""Views of services, workers and supervisors, for tests of what is made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from millstream.broker.contract.job import Priority
from millstream.broker.queue.supervisors import SupervisorState, SupervisorView
from millstream.broker.queue.views import ServiceView, WorkerView

WORKER = WorkerView(
    consumer="gpu1-7-aa",
    state="ready",
    host="gpu1",
    pid=7,
    device="cuda:0",
    fingerprint="weights",
    beat_age_ms=300,
    age_ms=0,
    running=0,
    running_ms=0,
    past="",
    jobs=0,
    rows=0,
    forwards=0,
    tokens=0,
    padded=0,
    errors=0,
    late=0,
    busy_ms=0,
    batch_tokens=2048,
    text_tokens=512,
    threads=1,
    cuts={},
    memory=310_000_000,
    loads=9,
    loads_minute=2,
)
SUPERVISOR = SupervisorView(SupervisorState("h", 1, 1, 1, cores=2), age_ms=100, clock_ms=0)
NONE: dict[Priority, int] = dict.fromkeys(Priority, 0)
EMPTY = ServiceView("docs", NONE, {}, 0, None, [], 0, None, {}, [], NONE)


def view(name: str, **fields: Any) -> ServiceView:
    """The view of a service without jobs and workers, but for `fields`."""
    return replace(EMPTY, name=name, **fields)
