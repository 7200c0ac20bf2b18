"""Rows that were answered before are not sent again: their answers are looked up in the service's cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from millstream.broker.cache import Cache, Cached, Recipe
from millstream.broker.connection import Connection
from millstream.broker.job import Json
from millstream.broker.registry import Registry

LOOK_UP_S = 1.0
"""A look-up that takes longer is given up, and none is tried for as long: the rows are computed instead."""

AT_ONCE = 4
"""Look-ups of one process, each on a connection of its own: more threads would only wait for one another."""


class Recall:
    """Looks up kept answers; thread-safe. A server that does not answer has none."""

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self.begin()

    def begin(self) -> None:
        """Also in a forked child: a client of its own."""
        self._client = self._connection.within(LOOK_UP_S)
        self._free = threading.Semaphore(AT_ONCE)
        self._not_before = 0.0

    def rows(
        self, service: str, recipe: Recipe, texts: Mapping[int, str], options: Mapping[str, Json]
    ) -> dict[int, Cached]:
        """The kept answers of `texts` (row -> text), by row. A text that comes twice is asked for once."""
        once = list(dict.fromkeys(texts.values()))
        digests = recipe.digests(once, options)
        with self._free:
            hits = self._look_up(service, digests, recipe.fingerprint) if time.monotonic() >= self._not_before else ()
        found = {text: hit for text, hit in zip(once, hits, strict=False) if hit is not None}
        return {row: found[text] for row, text in texts.items() if text in found}

    def _look_up(self, service: str, digests: Sequence[str], fingerprint: str) -> Sequence[Cached | None]:
        cache = Cache(self._client, self._registry.keys(service))
        hits = cache.look_up(digests, fingerprint)
        if cache.faults:
            self._not_before = time.monotonic() + LOOK_UP_S
        return hits
