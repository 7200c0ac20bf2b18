"""Looks at what waits in a service's streams, for a worker that decides whether to load its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import redis

from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.contract.keys import GROUP, RETURNED, ServiceKeys
from millstream.broker.queue import scripts


class Waiting(NamedTuple):
    """Jobs of one priority that no worker holds. `at`: time at which the oldest was accepted, `deadline`: its own.

    Both are server ms, 0 if there is none.
    """

    jobs: int
    at: int
    deadline: int


class Look(NamedTuple):
    """The streams of one service at `now`, server ms."""

    now: int
    paused: bool
    streams: Mapping[Priority, Waiting]


def look(client: redis.Redis, keys: ServiceKeys) -> Look:
    """Returns what waits. Changes nothing. Raises redis errors."""
    now, paused, *figures = scripts.run(client, "look", [*keys.streams(), keys.paused()], [GROUP, RETURNED])
    streams = {each: Waiting(*figures[3 * at : 3 * at + 3]) for at, each in enumerate(PRIORITIES)}
    return Look(now, bool(paused), streams)
