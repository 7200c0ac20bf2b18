"""The verbs of the job streams: enqueue, claim, settle. One class, each method one script."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import redis

from millstream.broker import scripts
from millstream.broker.codec import decode_entry, encode_reply, salvage
from millstream.broker.errors import BrokerUnavailable, Cancelled, Malformed
from millstream.broker.job import PRIORITIES, Address, Claim, Draft, Priority, Reply
from millstream.broker.keys import GROUP, RETURNED, STREAM_INDEX, ServiceKeys
from millstream.broker.lease import LEASE_S

MAX_JOBS_PER_CALL = 128
MAX_BYTES_PER_CALL = 1024 * 1024
DEAD_LETTERS_KEPT = 10_000
REPLY_TTL_MS = 300_000
REPLICA_MS = 500
"""How long a replica may take to confirm jobs: one sender waits meanwhile for all of a process."""

UNREAD_BYTES = 128 * 1024 * 1024
"""A client that leaves more unread in its reply stream is dead or frozen: answers beyond it become dead letters."""

LONGEST_MS = 100 * 366 * 86_400_000
"""A longer time, or an infinite one, is sent as this: no server can keep a key for longer than it can count."""

Entries = list[tuple[bytes, dict[bytes, bytes]]]
Delivered = list[tuple[bytes, list[tuple[bytes, list[bytes]]]]]

_XREADGROUP = b"XREADGROUP"
"""As bytes the library has no callback for it, and does not make a dict of each entry: doubled fields would merge."""


class Group(NamedTuple):
    """Jobs of one call and tenant: accepted together or refused together.

    `calls` is what the rate limit on requests is charged: 1, or 0 for the later parts of a call. `replicated`: nothing
    counts as accepted before a replica has it.
    """

    priority: Priority
    drafts: Sequence[Draft]
    calls: int = 1
    replicated: bool = False


Refusal = Literal["unknown_service", "paused", "queue_full", "rate_limited", "over_burst"]


class Admission(NamedTuple):
    """What became of a group. `refused` is empty where it was accepted; `retry_after` in seconds."""

    refused: Refusal | Literal[""] = ""
    retry_after: float = 0.0


_ACCEPTED = Admission()


@dataclass(frozen=True, slots=True)
class Limit:
    """How much one claim may take. `empty_handed`: the worker holds nothing, so one job may exceed rows and tokens.

    `saved` are the rows that normal and batch jobs may take before more urgent ones. New jobs are taken from the first
    `streams`, the most urgent ones, and returned jobs from the first `returned`. `held`: jobs in this worker's hand, a
    part of its share of all that waits; beyond its share it takes `next_rows`, those missing in its next micro-batch.
    `max_attempts` bounds groups of suspects; `job`: rows and tokens of the job it took last.
    """

    jobs: int
    rows: int
    tokens: int
    live_workers: int = 1
    empty_handed: bool = False
    streams: int = 3
    returned: int = 3
    saved: tuple[int, int] = (0, 0)
    held: int = 0
    next_rows: int = 0
    max_attempts: int = 3
    job: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class Claimed:
    """One claim's yield. `now`: server clock, ms. `waiting`: jobs left, new and returned ones, by stream.

    `suspects`: the most urgent stream, 1 to 3, with suspects left for a worker that holds nothing; 0 for none.
    `paused`: nothing is given to anybody for the time being. The first `woken` claims came to a sleeper, even so.
    `blocked`: the stream, 1 to 3, whose next job had more rows or tokens than there was room left for; 0 for none.
    """

    now: int
    waiting: tuple[int, ...] = (0, 0, 0)
    suspects: int = 0
    paused: bool = False
    blocked: int = 0
    claims: list[Claim] = field(default_factory=list)
    woken: int = 0


class Settlement(NamedTuple):
    """One job's end: its encoded reply, and for a job that cannot succeed the reason to bury it."""

    address: Address
    reply: bytes
    bury: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A detached job, looked up. Without a `reply` a `known` one is under way; an unknown one expired or never was."""

    reply: bytes | None
    known: bool


Settled = Literal["answered", "late", "unwritable"]
_SETTLED: dict[int, Settled] = {1: "answered", 0: "late", -1: "unwritable"}

CancelOutcome = Literal["waiting", "running", "gone"]
_CANCEL_OUTCOMES: dict[int, CancelOutcome] = {2: "waiting", 1: "running", 0: "gone"}
_CANCELLED = encode_reply(Reply(error=Cancelled("cancelled by its caller before it ran")))
_PURGED = encode_reply(Reply(error=Cancelled("purged from the queue before it ran", hint="an operator did it")))


class Streams:
    """The three job streams of one service, over one client."""

    def __init__(
        self,
        client: redis.Redis,
        keys: ServiceKeys,
        *,
        result_ttl_ms: int = 3_600_000,
        unread_bytes: int = UNREAD_BYTES,
    ) -> None:
        self._client = client
        self._keys = keys
        self._streams = keys.streams()
        self._result_ttl_ms = result_ttl_ms
        self._unread_bytes = unread_bytes

    def create_groups(self) -> None:
        """Make streams and group where they are missing, from the first entry on: a queued job is never skipped."""
        for stream in self._streams:
            try:
                self._client.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except redis.exceptions.ResponseError as error:
                # At maxmemory the server refuses before it looks: a worker may start where the group is there.
                if "BUSYGROUP" not in str(error) and not self._has_group(stream):
                    raise

    def _has_group(self, stream: str) -> bool:
        try:
            return bool(self._client.xinfo_groups(stream))
        except redis.exceptions.ResponseError:
            return False

    def enqueue(self, groups: Sequence[Group]) -> list[Admission]:
        """Accept each group or refuse it whole; sending the same jobs again changes nothing.

        At most MAX_JOBS_PER_CALL jobs and about MAX_BYTES_PER_CALL in one call. Raises BrokerUnavailable where a group
        is to be replicated and no replica had it in time: it may run all the same, and is to be sent again.
        """
        bucket, seen = self._keys.bucket(), self._keys.seen("")
        keys = [self._keys.spec(), *self._streams, bucket, self._keys.paused(), self._keys.refused()]
        args: list[scripts.Argument] = [len(groups)]
        now = time.monotonic()
        for priority, drafts, calls, _ in groups:
            tenant = drafts[0].tenant
            keys.append(self._keys.bucket(tenant) if tenant else bucket)
            args += (STREAM_INDEX[priority], len(drafts), calls)
            for draft in drafts:
                keys.append(seen + draft.id)
                args += _draft_args(draft, now)
        if any(group.replicated for group in groups):
            return self._enqueue_replicated(keys, args)
        return [_admission(outcome) for outcome in scripts.run(self._client, "enqueue", keys, args)]

    def _enqueue_replicated(self, keys: Sequence[str], args: Sequence[scripts.Argument]) -> list[Admission]:
        outcomes, replicas = scripts.run_copied(self._client, "enqueue", keys, args, REPLICA_MS)
        admissions = [_admission(outcome) for outcome in outcomes]
        if not replicas and not all(admission.refused for admission in admissions):
            raise BrokerUnavailable(
                f"no replica confirmed within {REPLICA_MS} ms that it has the jobs of service {self._keys.service!r}",
                hint="see INFO replication on the master; redis.durability is replicated",
            )
        return admissions

    def claim(self, consumer: str, limit: Limit) -> Claimed:
        """Take what waits, within `limit`, at once. A malformed entry comes as a claim that says so."""
        return _claimed([], scripts.run(self._client, "claim", *self._claim_words(consumer, limit)))

    def wait(self, consumer: str, wait_s: float, limit: Limit) -> Claimed:
        """Sleep until a new job comes and take it, with what else waits within `limit`; for `wait_s` at most.

        Of those who sleep one wakes for each job. Its job comes first, also where the service is paused.
        """
        block_ms = max(1, round(wait_s * 1000))
        command: list[scripts.Argument] = [_XREADGROUP, "GROUP", GROUP, consumer, "COUNT", 1, "BLOCK", block_ms]
        command += ["STREAMS", *self._streams, ">", ">", ">"]
        woken, rest = scripts.run_after(self._client, command, "claim", *self._claim_words(consumer, limit))
        # A stream went while we slept: Redis 7.0's own word for it. The next claim says what is the matter.
        if isinstance(woken, Exception) and "UNBLOCKED" not in str(woken):
            raise woken
        delivered = [] if isinstance(woken, Exception) else cast(Delivered, woken or [])
        claims = [
            _claim(self._streams.index(stream.decode()) + 1, entry, flat, 0.0)
            for stream, entries in delivered
            for entry, flat in entries
        ]
        return _claimed(claims, rest)

    def _claim_words(self, consumer: str, limit: Limit) -> tuple[list[str], list[scripts.Argument]]:
        """Keys and arguments of the claim script."""
        args: list[scripts.Argument] = [GROUP, consumer, RETURNED, limit.jobs, limit.rows, limit.tokens]
        args += (max(1, limit.live_workers), limit.held, limit.next_rows, int(limit.empty_handed))
        args += (limit.streams, limit.returned, *limit.saved, limit.max_attempts, round(LEASE_S * 1000), *limit.job)
        return [*self._streams, self._keys.paused(), self._keys.workers(), self._keys.trail()], args

    def settle(self, settlements: Sequence[Settlement]) -> list[Settled]:
        """Write each job's reply and retire its entry, in one step and once: a late twin is dropped."""
        keys = [*self._streams, self._keys.dead(), self._keys.trail()]
        seen, jobs = self._keys.seen(""), list[str]()
        # Most answers of a call go the same way, to one client.
        ways: dict[tuple[str, str, int], int] = {}
        words: list[scripts.Argument] = []
        for address, reply, bury in settlements:
            way = ways.setdefault(self._destination(address), len(ways) + 1)
            jobs.append(seen + address.job_id)
            words += (address.name, way, address.job_id, reply, bury)
        args: list[scripts.Argument] = [GROUP, DEAD_LETTERS_KEPT, self._unread_bytes, len(ways)]
        for kind, key, ttl in ways:
            keys.append(key)
            args += (kind, ttl)
        keys += jobs
        args += words
        return [_SETTLED[outcome] for outcome in scripts.run(self._client, "settle", keys, args)]

    def cancel(self, job_ids: Sequence[str], client: str) -> list[CancelOutcome]:
        """Stop jobs of `client` (empty: detached ones), each by its id: "waiting" ones are gone and answered as
        Cancelled, "running" ones end at their worker's next beat, "gone" ones are settled or never were.
        """
        keys = [*self._streams, self._keys.cancelled(), self._keys.trail()]
        args: list[scripts.Argument] = [GROUP, RETURNED]
        for job_id in job_ids:
            kind, key, ttl = self._destination(Address("", job_id, client))
            keys += (self._keys.seen(job_id), key)
            args += (job_id, kind, ttl, _CANCELLED)
        return [_CANCEL_OUTCOMES[outcome] for outcome in scripts.run(self._client, "cancel", keys, args)]

    def purge(self) -> int:
        """Take every job off the queue that waits now, each answered as Cancelled; how many. Running ones go on."""
        # Up to the newest entries there are: jobs that keep coming must not make it endless.
        ends = [cast(Entries, self._client.xrevrange(stream, count=1)) for stream in self._streams]
        return sum([self._purge(each, end[0][0]) for each, end in zip(PRIORITIES, ends, strict=True) if end])

    def _purge(self, priority: Priority, last: bytes) -> int:
        stream, purged, after = self._keys.stream(priority), 0, "-"
        while page := cast(Entries, self._client.xrange(stream, after, last, count=MAX_JOBS_PER_CALL)):
            keys = [*self._streams, self._keys.trail()]
            args: list[scripts.Argument] = [GROUP, RETURNED]
            for entry, fields in page:
                address = _claim(STREAM_INDEX[priority], entry, _flat(fields), 0.0).address
                kind, key, ttl = self._destination(address)
                keys += (key, self._keys.seen(address.job_id))
                args += (STREAM_INDEX[priority], address.entry, address.job_id, kind, ttl, _PURGED)
            purged += sum(scripts.run(self._client, "purge", keys, args))
            after = f"({page[-1][0].decode()}"
        return purged

    def look_up(self, job_ids: Sequence[str]) -> list[Found]:
        """What is known of detached jobs: each one's encoded reply, or how far it is."""
        pipe = self._client.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.get(self._keys.result(job_id))
            pipe.exists(self._keys.seen(job_id))
        answers = pipe.execute()
        return [Found(reply=reply, known=bool(known)) for reply, known in zip(answers[::2], answers[1::2], strict=True)]

    def _destination(self, address: Address) -> tuple[str, str, int]:
        # Built from ids that were checked: a key taken from the entry would make the worker write anywhere.
        if not address.job_id:
            return "none", self._keys.dead(), 0
        if address.client:
            return "stream", self._keys.reply(address.client), REPLY_TTL_MS
        return "string", self._keys.result(address.job_id), self._result_ttl_ms


def _remaining(moment: float | None, now: float) -> int | str:
    return "" if moment is None else round(min(max(0.0, (moment - now) * 1000), LONGEST_MS))


def _draft_args(draft: Draft, now: float) -> tuple[scripts.Argument, ...]:
    job_id, op, rows, tokens, body, client, deadline, queue_by, tenant, trace = draft
    until, until_start = _remaining(deadline, now), _remaining(queue_by, now)
    return job_id, op, rows, tokens, until, until_start, client, tenant, trace, body


def _admission(outcome: list[int | bytes]) -> Admission:
    if outcome[0] != 0:
        return _ACCEPTED
    return Admission(cast(Refusal, cast(bytes, outcome[1]).decode()), cast(int, outcome[2]) / 1000)


def _claim(stream: int, entry: bytes, flat: Sequence[bytes], attempts: float, *, by_share: bool = False) -> Claim:
    name = f"{stream}:{entry.decode()}"
    try:
        job = decode_entry(flat)
    except Malformed as error:
        return Claim(Address(name, *salvage(flat)), None, attempts, str(error), by_share)
    return Claim(Address(name, job.id, job.client), job, attempts, by_share=by_share)


def _claimed(woken: list[Claim], answer: Any) -> Claimed:
    now, waiting, suspects, paused, blocked, *taken = answer
    claims = [
        _claim(stream, entry, fields, (deliveries - 1) / 2, by_share=bool(by_share))
        for stream, entry, deliveries, fields, by_share in taken
    ]
    return Claimed(now, tuple(waiting), suspects, bool(paused), blocked, woken + claims, len(woken))


def _flat(fields: dict[bytes, bytes]) -> list[bytes]:
    return [part for pair in fields.items() for part in pair]
