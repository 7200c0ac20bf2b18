"""Describes the end of a worker process, charges attempts for it, and gives its jobs back to the queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from millstream.broker.queue.lease import Lease
from millstream.worker.supervision.progress import Snapshot

Charged = Mapping[str, Sequence[Snapshot]]
"""Stages whose entries are charged, by service."""

NOT_CHARGED: Charged = MappingProxyType({})


class End(NamedTuple):
    """The end of a worker process. `what`: what happened. `why`: the reason, "" if unknown.

    `charged`: the stages that may have caused it. Each of their entries is charged an attempt. It is empty if the
    supervisor ordered the end.
    """

    what: str
    charged: Sequence[Snapshot] = ()
    why: str = ""

    def __str__(self) -> str:
        stages = " and ".join(dict.fromkeys(snapshot.stage.name.lower() for snapshot in self.charged))
        during = f" during {stages}" if stages else ""
        return f"{self.what}{during} ({self.why})" if self.why else f"{self.what}{during}"


def give_back(lease: Lease, consumer: str, end: End, *, ring: bool = True) -> int:
    """Gives back the entries of `consumer`, charging those in `end.charged`. Returns their number. Raises as Lease.

    `ring` is as in Lease.release.
    """
    # One call for each stage, before the rest: the trail of an entry names its own stage.
    returned = sum(
        lease.release(
            consumer, started=each.entries, only=each.entries, how=str(end._replace(charged=[each])), ring=ring
        )
        for each in end.charged
    )
    return returned + lease.release(consumer, gone=True, how=str(end), ring=ring)
