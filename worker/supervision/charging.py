"""How a worker process ended, who is charged an attempt for it, and giving back to the queue what it held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from millstream.broker.queue.lease import Lease
from millstream.worker.supervision.progress import Snapshot


class End(NamedTuple):
    """The end of a worker process: what happened, why if that is known, and what it is charged to.

    `charged` is what its threads had in hand that may have caused it: each of these entries loses an attempt. It is
    empty for an end that was ordered.
    """

    what: str
    charged: Sequence[Snapshot] = ()
    why: str = ""

    def __str__(self) -> str:
        stages = " and ".join(dict.fromkeys(snapshot.stage.name.lower() for snapshot in self.charged))
        during = f" during {stages}" if stages else ""
        return f"{self.what}{during} ({self.why})" if self.why else f"{self.what}{during}"


def give_back(lease: Lease, consumer: str, end: End) -> int:
    """Give back what `consumer` held, with an attempt for what it is charged to; how many entries. Raises as Lease."""
    # Each stage first, and by itself: the trail of an entry names the stage that it was in.
    returned = sum(
        lease.release(
            consumer, started=snapshot.entries, only=snapshot.entries, how=str(end._replace(charged=[snapshot]))
        )
        for snapshot in end.charged
    )
    return returned + lease.release(consumer, gone=True, how=str(end))
