"""The short words beside a service that say what is wrong with it, made of doctor's findings. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from millstream.broker.queue.diagnosis import Finding, Severity

WORDS = {
    "crash_loop": "workers crash",
    "dead_supervisor": "supervisor died",
    "mixed_weights": "mixed weights",
    "model_not_loaded": "model not loaded",
    "no_worker": "no worker",
    "paused": "paused",
    "queue_full": "full",
    "stale_consumer": "lost workers",
    "starting": "starting",
    "unreadable_service": "unreadable",
    "worker_refused": "worker refused",
}
"""Word of each cause that has a badge; the others are only in the list of findings."""


class Badge(NamedTuple):
    severity: Severity
    word: str
    what: str


def badges(findings: Iterable[Finding], service: str) -> list[Badge]:
    """Returns the badges of a service, one for each cause, the most severe first."""
    first: dict[str, Finding] = {}
    for each in findings:
        if each.service == service and each.cause in WORDS:
            first.setdefault(each.cause, each)
    return [Badge(each.severity, WORDS[cause], each.what) for cause, each in first.items()]
