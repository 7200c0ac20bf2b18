"""Reads what the server knows of single jobs: their state, how earlier runs ended, the times of their stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, cast

from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import Malformed
from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.contract.keys import GROUP, RETURNED, ServiceKeys
from millstream.broker.contract.stages import Stages
from millstream.broker.queue.claims import decode_claim, flat_fields
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection, is_missing_group, translated

SEEN_AFTER_SETTLE_MS = 20_000
"""Milliseconds for which the server remembers a job of a call that is not detached, after it was settled."""

State = Literal["waiting", "given back", "running", "settled", "answered"]
"""`settled`: answered to a client, so that only the times of enqueue and settle are left on the server."""

Entries = Sequence[tuple[bytes, dict[bytes, bytes]]]


@dataclass(frozen=True, slots=True)
class JobTrace:
    """State and times of one job, in server ms; `now` is the time of the look. None: not known, or not reached.

    `attempts`: runs that did not finish, 0.5 for each host lost. `history`: a line for each of them, until the job is
    answered. `error`: code of the error that answered all of its rows. `priority` and `rows` are known while it is in
    its stream.
    """

    service: str
    id: str
    state: State
    now: int
    enqueued: int | None = None
    claimed: int | None = None
    prepared: int | None = None
    started: int | None = None
    ended: int | None = None
    settled: int | None = None
    worker: str = ""
    attempts: float = 0.0
    batch: int | None = None
    priority: Priority | None = None
    rows: int | None = None
    error: str = ""
    history: Sequence[str] = field(default=())


def find_service(connection: Connection, prefix: str, job_id: str) -> str | None:
    """Returns the registered service that knows this job, and None if none does. Raises BrokerUnavailable."""
    registry = Registry(connection, prefix)
    names = registry.names()
    with translated(connection.safe_url):
        pipe = connection.client.pipeline(transaction=False)
        for name in names:
            pipe.exists(registry.keys(name).seen(job_id))
        known = pipe.execute()
    return next((name for name, exists in zip(names, known, strict=True) if exists), None)


def read_traces(
    connection: Connection, keys: ServiceKeys, job_ids: Sequence[str], call: str = ""
) -> list[JobTrace | None]:
    """Returns the trace of each job, in two round trips; None for a job that the server does not know, or no more.

    `call`: the detached call that the jobs are part of. Raises BrokerUnavailable.
    """
    with translated(connection.safe_url):
        pipe = connection.client.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.get(keys.seen(job_id))
            pipe.pttl(keys.seen(job_id))
            if call:
                pipe.hget(keys.call(call), job_id)
        # Behind a key: on a Cluster it is then asked of the node that writes the service's times.
        pipe.time()
        *answers, (seconds, micros) = pipe.execute()
        now, per_job = int(seconds) * 1000 + int(micros) // 1000, 3 if call else 2
        rest = iter(answers)
        places = [_Place(job_id, *islice(rest, per_job)) for job_id in job_ids]
        unsettled = _unsettled(connection, keys, [each for each in places if each.entry])
    return [_trace(keys.service, each, unsettled.get(each.id), now) for each in places]


@dataclass(frozen=True, slots=True)
class _Place:
    """The value of a job's key `seen`, the ms that key has left, and the job's reply in the hash of its call."""

    id: str
    accepted: bytes | None
    left_ms: int
    reply: bytes | None = None

    @property
    def entry(self) -> tuple[int, str] | None:
        """Number of its stream, 1 to 3, and its id there; None if it was answered or is not known."""
        stream, _, entry = (self.accepted or b"").decode().partition(":")
        # Clients of older versions wrote the entry id alone.
        return (int(stream), entry) if entry and stream in ("1", "2", "3") and not self.reply else None

    def settled_at(self, now: int) -> int | None:
        """Server ms at which its key `seen` got its last ttl; None if that was not by settling it."""
        return now + self.left_ms - SEEN_AFTER_SETTLE_MS if 0 <= self.left_ms <= SEEN_AFTER_SETTLE_MS else None


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A job in its stream: its entry, the consumer that holds it, its number of deliveries, its trail."""

    stream: int
    entry: tuple[bytes, dict[bytes, bytes]]
    consumer: str
    deliveries: int
    trail: str


def _unsettled(connection: Connection, keys: ServiceKeys, places: Sequence[_Place]) -> dict[str, _Unsettled]:
    """Returns those of these jobs that are in their stream, by id."""
    pipe = connection.client.pipeline(transaction=False)
    for each in places:
        stream, entry = cast(tuple[int, str], each.entry)
        pipe.xrange(keys.streams()[stream - 1], entry, entry)
        pipe.xpending_range(keys.streams()[stream - 1], GROUP, min=entry, max=entry, count=1)
        pipe.hget(keys.trail(), f"{stream}:{entry}")
    answers = iter(pipe.execute(raise_on_error=False)) if places else iter(())
    return dict(_found(places, answers))


def _found(places: Sequence[_Place], answers: Iterator[object]) -> Iterator[tuple[str, _Unsettled]]:
    for each in places:
        entries, pending, trail = islice(answers, 3)
        for answer in (entries, pending, trail):
            if isinstance(answer, Exception) and not is_missing_group(answer):
                raise answer
        if not isinstance(entries, list) or not entries:
            continue
        held = cast(list[dict[str, object]], pending if isinstance(pending, list) else [])
        consumer = cast(bytes, held[0]["consumer"]).decode() if held else ""
        deliveries = cast(int, held[0]["times_delivered"]) if held else 1
        history = cast(bytes, trail or b"").decode(errors="backslashreplace")
        stream, _ = cast(tuple[int, str], each.entry)
        yield each.id, _Unsettled(stream, cast(Entries, entries)[0], consumer, deliveries, history)


def _trace(service: str, place: _Place, unsettled: _Unsettled | None, now: int) -> JobTrace | None:
    if place.reply:
        return _answered(service, place, place.reply, now)
    if unsettled:
        return _in_stream(service, place.id, unsettled, now)
    if place.entry:
        _, entry = place.entry
        enqueued = int(entry.partition("-")[0])
        return JobTrace(service, place.id, "settled", now, enqueued=enqueued, settled=place.settled_at(now))
    return None


def _in_stream(service: str, job_id: str, found: _Unsettled, now: int) -> JobTrace:
    entry, fields = found.entry
    attempts = max(0, found.deliveries - 1) / 2
    claim = decode_claim(found.stream, entry, flat_fields(fields), attempts)
    is_returned = found.consumer == RETURNED
    return JobTrace(
        service,
        job_id,
        "given back" if is_returned else "running" if found.consumer else "waiting",
        now,
        enqueued=claim.job.at if claim.job else None,
        worker="" if is_returned else found.consumer,
        attempts=attempts,
        priority=PRIORITIES[found.stream - 1],
        rows=claim.job.rows if claim.job else None,
        history=found.trail.splitlines(),
    )


def _answered(service: str, place: _Place, blob: bytes, now: int) -> JobTrace:
    try:
        reply = decode_reply(blob)
    except Malformed:
        return JobTrace(service, place.id, "answered", now, error="unreadable")
    stages = reply.stages or Stages("")
    return JobTrace(
        service,
        place.id,
        "answered",
        now,
        enqueued=stages.enqueued or None,
        claimed=stages.claimed or None,
        prepared=stages.prepared or None,
        started=stages.started or None,
        ended=stages.ended or None,
        settled=stages.settled or None,
        worker=stages.worker,
        attempts=stages.attempts,
        batch=stages.batch or None,
        error=reply.error.code if reply.error else "",
    )
