"""Writes answers to the cache, if the service has one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from millstream.broker.contract.job import Json
from millstream.broker.queue.cache import Cache, Cached, CacheKey, encode
from millstream.worker.intake.settler import Finished

log = logging.getLogger(__name__)


class CacheWriter:
    """Computes cache keys in the claimer's thread and writes answers in the settler's. No cache if `ttl_s` is None."""

    def __init__(self, cache: Cache, cache_key: CacheKey) -> None:
        self._cache = cache
        self._cache_key = cache_key
        self.ttl_s: float | None = None

    def digests(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> Sequence[str]:
        """Cache key of each row's answer, "" for a row that is no text; empty if there is no cache."""
        if self.ttl_s is None:
            return ()
        names = iter(self._cache_key.digests((text for text in inputs if isinstance(text, str)), options))
        return [next(names) if isinstance(text, str) else "" for text in inputs]

    def encoded(self, finished: Finished) -> list[tuple[str, bytes]]:
        """Cache keys and encoded answers of the job's rows without an error; empty if there is no cache."""
        return list(_answers(finished)) if self.ttl_s is not None and finished.digests else []

    def write(self, answers: Sequence[tuple[str, bytes]]) -> None:
        """Writes answers to the cache. If that fails they are not cached; the job is not affected."""
        if self.ttl_s is None or not answers:
            return
        before = self._cache.faults
        self._cache.keep(answers, self.ttl_s)
        if self._cache.faults and not before:
            log.warning("answers cannot be written to the cache: %s", self._cache.fault)


def _answers(finished: Finished) -> Iterator[tuple[str, bytes]]:
    reply = finished.reply
    if reply.error is not None:
        return
    results: Iterator[object] = iter(reply.vectors if reply.vectors is not None else reply.values or [])
    for at, digest in enumerate(finished.digests):
        if at in reply.errors:
            continue
        cached = Cached(next(results), at in reply.truncated)  # type: ignore[arg-type]
        if digest and (body := _encoded(cached)) is not None:
            yield digest, body


def _encoded(cached: Cached) -> bytes | None:
    try:
        return encode(cached)
    except BaseException:  # noqa: BLE001 - a result may have code of its own, and must not fail other rows
        return None
