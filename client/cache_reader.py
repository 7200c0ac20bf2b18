"""Cache reader: finds the answers of rows that were answered before, so that these rows are not sent again."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from millstream.broker.contract.job import Json
from millstream.broker.queue.cache import CHUNK, Cache, Cached, CacheKey
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection
from millstream.client.cache_hits import CacheHits

log = logging.getLogger(__name__)

LOOK_UP_S = 0.25
"""Seconds after which a look-up is given up and the rows are computed instead; part of the call's timeout.

For the same time after a failed look-up no other one is tried.
"""

AT_ONCE = 4
"""Blocking look-ups that run at the same time, each on its own connection: more threads would only wait for each
other."""

IDLE_S = 1.0
"""Seconds without a question after which the thread that serves event loops ends; the next question starts another."""


@dataclass(slots=True, eq=False)
class _Question:
    """Rows of one call (row -> text). `deliver` gets their cached answers, by row, from any thread."""

    service: str
    cache_key: CacheKey
    texts: Mapping[int, str]
    options: Mapping[str, Json]
    deliver: Callable[[dict[int, Cached]], object]
    once: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    found: list[Cached | None] = field(default_factory=list)

    def name(self) -> None:
        """Computes the digests, the answers' names in the cache. Equal texts are looked up once."""
        self.once = list(dict.fromkeys(self.texts.values()))
        self.digests = self.cache_key.digests(self.once, self.options)

    @property
    def missing(self) -> int:
        return len(self.digests) - len(self.found)

    def collect_rows(self) -> dict[int, Cached]:
        made_by = self.cache_key.fingerprint
        hits = zip(self.once, self.found, strict=False)
        found = {text: hit._replace(fingerprint=made_by) for text, hit in hits if hit is not None}
        return {row: found[text] for row, text in self.texts.items() if text in found}


class CacheReader:
    """Reads cached answers. Thread-safe. If the server does not answer in time, every row counts as a miss."""

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self._hits = CacheHits(connection, registry)
        self._begin()

    def after_fork(self) -> None:
        """Gives a forked child its own connections, locks and threads."""
        self._hits.after_fork()
        self._begin()

    def _begin(self) -> None:
        self._client = self._connection.within(LOOK_UP_S)
        self._free = threading.Semaphore(AT_ONCE)
        self._not_before = 0.0
        self._lock = threading.Lock()
        self._gatherer: _Gatherer | None = None

    def read(
        self, service: str, cache_key: CacheKey, texts: Mapping[int, str], options: Mapping[str, Json]
    ) -> dict[int, Cached]:
        """Returns the cached answers of `texts` (row -> text), by row. Waits for the server."""
        question = _Question(service, cache_key, texts, options, deliver=len)
        question.name()
        with self._free:
            question.found += self._look_up(service, question.digests)
        found = question.collect_rows()
        self._hits.add(service, len(found))
        return found

    def read_soon(
        self,
        service: str,
        cache_key: CacheKey,
        texts: Mapping[int, str],
        options: Mapping[str, Json],
        deliver: Callable[[dict[int, Cached]], object],
    ) -> None:
        """Does as `read`, but returns at once: `deliver` gets the answers, from another thread."""

        def count_and_deliver(found: dict[int, Cached]) -> None:
            self._hits.add(service, len(found))
            deliver(found)

        question = _Question(service, cache_key, texts, options, count_and_deliver)
        with self._lock, suppress(RuntimeError):
            if self._gatherer is None or not self._gatherer.ask(question):
                gatherer = _Gatherer(self._look_up)
                gatherer.ask(question)
                gatherer.start()
                self._gatherer = gatherer
            return
        # No thread could be started, so every row is a miss and is computed.
        deliver({})

    def flush(self) -> None:
        """Adds the rows found so far to the metrics of their services."""
        self._hits.flush()

    def close(self) -> None:
        """Does as `flush`, and ends the thread that counts."""
        self._hits.close()

    def _look_up(self, service: str, digests: Sequence[str]) -> Sequence[Cached | None]:
        if time.monotonic() < self._not_before:
            return [None] * len(digests)
        cache = Cache(self._client, self._registry.keys(service))
        hits = cache.look_up(digests)
        if cache.faults:
            self._not_before = time.monotonic() + LOOK_UP_S
        return hits


class _Gatherer(threading.Thread):
    """Thread that looks up the rows of many async calls in one command. Ends after IDLE_S without a question."""

    def __init__(self, look_up: Callable[[str, Sequence[str]], Sequence[Cached | None]]) -> None:
        super().__init__(name="millstream-cache-reader", daemon=True)
        self._look_up = look_up
        self._new: queue.SimpleQueue[_Question] = queue.SimpleQueue()
        self._open: deque[_Question] = deque()
        self._lock = threading.Lock()
        self._ended = False

    def ask(self, question: _Question) -> bool:
        """Queues `question` for an answer; returns False if this thread has ended."""
        with self._lock:
            if not self._ended:
                self._new.put(question)
            return not self._ended

    def run(self) -> None:
        while self._gather():
            self._answer()

    def _gather(self) -> bool:
        """Takes the queued questions; returns False if there was none for IDLE_S."""
        with suppress(queue.Empty):
            if not self._open:
                self._open.append(_name(self._new.get(timeout=IDLE_S)))
            while len(self._open) < CHUNK:
                self._open.append(_name(self._new.get_nowait()))
        with self._lock:
            self._ended = not self._open and self._new.empty()
            return not self._ended

    def _answer(self) -> None:
        """Looks up one share of the questions, and delivers the answers of those that are complete."""
        share = self._share()
        digests = [digest for question, size in share for digest in question.digests[len(question.found) :][:size]]
        try:
            found = self._look_up(share[0][0].service, digests) if digests else []
        except Exception:
            # The thread must go on, since it serves all calls. These rows are misses and are computed.
            log.exception("looking up cached answers failed")
            found = [None] * len(digests)
        at = 0
        for question, size in share:
            question.found += found[at : at + size]
            at += size
            if question.missing:
                self._open.append(question)
            else:
                _deliver(question)

    def _share(self) -> list[tuple[_Question, int]]:
        """Returns questions about one service with the number of digests to look up for each, CHUNK in all.

        A question with more rows than fit goes to the end of the queue, so long questions take turns.
        """
        share: list[tuple[_Question, int]] = []
        room, others = CHUNK, list[_Question]()
        while self._open and room:
            question = self._open.popleft()
            if share and question.service != share[0][0].service:
                others.append(question)
                continue
            size = min(room, question.missing)
            share.append((question, size))
            room -= size
        self._open.extendleft(reversed(others))
        return share


def _name(question: _Question) -> _Question:
    try:
        question.name()
    except Exception:
        # Rows without digests are misses and are computed.
        log.exception("computing the names of cached answers failed")
    return question


def _deliver(question: _Question) -> None:
    try:
        question.deliver(question.collect_rows())
    except Exception:
        log.exception("cached answers could not be delivered to a call")
