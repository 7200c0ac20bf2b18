"""Keeps what this worker computed for callers that ask again, where its service has a cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from millstream.broker.cache import Cache, Cached, Recipe, encode
from millstream.broker.job import Json
from millstream.worker.settler import Finished

log = logging.getLogger(__name__)


class Keeper:
    """Names rows in the claimer's thread and writes their answers in the settler's. `ttl_s` None: does neither."""

    def __init__(self, cache: Cache, recipe: Recipe) -> None:
        self._cache = cache
        self._recipe = recipe
        self.ttl_s: float | None = None

    def digests(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> Sequence[str]:
        """Under which name each row's answer is to be kept: "" for what is no text; nothing where none is kept."""
        if self.ttl_s is None:
            return ()
        names = iter(self._recipe.digests((text for text in inputs if isinstance(text, str)), options))
        return [next(names) if isinstance(text, str) else "" for text in inputs]

    def keep(self, finished: Sequence[Finished]) -> None:
        """Write the answers of rows without an error. A fault costs the answers' being kept, and nothing else."""
        if self.ttl_s is None:
            return
        if answers := [answer for each in finished if each.digests for answer in _answers(each)]:
            before = self._cache.faults
            self._cache.keep(answers, self.ttl_s)
            if self._cache.faults and not before:
                log.warning("answers cannot be kept in the cache: %s", self._cache.fault)


def _answers(finished: Finished) -> Iterator[tuple[str, bytes]]:
    reply = finished.reply
    if reply.error is not None:
        return
    results: Iterator[object] = iter(reply.vectors if reply.vectors is not None else reply.values or [])
    for at, digest in enumerate(finished.digests):
        if at in reply.errors:
            continue
        cached = Cached(next(results), at in reply.truncated)  # type: ignore[arg-type]
        with suppress(TypeError, ValueError, RecursionError):
            if digest:
                yield digest, encode(cached)
