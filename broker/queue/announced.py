"""Figures of the announcements that wait for their webhooks. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import redis

from millstream.broker.contract.keys import GROUP, ServiceKeys


@dataclass(frozen=True, slots=True)
class Announced:
    """Announcements of one service that are not delivered and not given up.

    `oldest_ms` is the age of the oldest one, 0 if there is none. `unsent_ms` is the time since a sender last looked for
    some, by the server's clock; None if none has looked since the stream was made. A live sender looks every second.
    """

    count: int = 0
    oldest_ms: int = 0
    unsent_ms: int | None = None


def queue_announced(pipe: redis.client.Pipeline, keys: ServiceKeys) -> None:
    """Adds the commands to `pipe` whose three replies `read_announced` takes."""
    pipe.xlen(keys.webhooks())
    pipe.xrange(keys.webhooks(), count=1)
    pipe.xinfo_consumers(keys.webhooks(), GROUP)


def read_announced(answers: Sequence[object], now: int) -> Announced:
    """Returns the figures, given the replies. `now`: server ms."""
    count, first, senders = answers
    made = [int(entry.partition(b"-")[0]) for entry, _ in cast(Sequence[tuple[bytes, object]], first or [])]
    idle = [cast(int, each["idle"]) for each in cast(Sequence[Mapping[str, object]], senders or [])]
    return Announced(cast(int, count), max(0, now - min(made, default=now)), min(idle, default=None))
