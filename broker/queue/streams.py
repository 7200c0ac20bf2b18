"""Operations on the job streams: enqueue, claim, settle, emit, cancel, purge. Each method runs one script."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import redis

from millstream.broker.contract.errors import BrokerUnavailable, ReplyTooLarge
from millstream.broker.contract.job import PRIORITIES, Address, Draft, Priority
from millstream.broker.contract.keys import GROUP, RETURNED, STREAM_INDEX, ServiceKeys
from millstream.broker.contract.partial import encode_delta
from millstream.broker.queue import scripts
from millstream.broker.queue.admission import FAIR, FAIR_FIELD
from millstream.broker.queue.claims import ClaimBudget, Claimed, decode_claim, decode_claimed, flat_fields
from millstream.broker.queue.lease import LEASE_MS
from millstream.broker.queue.stream_types import (
    Admission,
    CancelOutcome,
    Emission,
    Group,
    Refusal,
    Settled,
    Settlement,
    Submitted,
)
from millstream.broker.queue.substitutes import CANCELLED, MAX_REPLY_BYTES, PURGED, TOO_LARGE, UNREAD, UNREAD_BYTES

MAX_JOBS_PER_CALL = 128
MAX_BYTES_PER_CALL = 1024 * 1024
"""Limits of one enqueue: jobs, and about so many bytes of bodies."""

DEAD_LETTERS_KEPT = 10_000
"""Most dead letters of a service, approximately: older ones are trimmed."""

REPLY_TTL_MS = 300_000
"""Lifetime of a client's reply stream after its last reply, ms."""

REPLICA_MS = 500
"""Time for a replica to confirm jobs, ms. It is short because a process's only sender thread waits for it."""

MARKS_KEPT_MS = 2 * LEASE_MS
"""Lifetime of a cancelled job's mark, ms. By then its worker has read it with a heartbeat, or has lost the job."""

MOST_UNREAD_DELTAS = 4_000
"""Entries. A reply stream that holds as many gets no deltas: its slow client gets the text with the reply."""

LONGEST_MS = 100 * 366 * 86_400_000
"""Longest time that is sent to the server, ms: a longer or infinite one would overflow its expiry of keys."""

Entries = list[tuple[bytes, dict[bytes, bytes]]]
Delivered = list[tuple[bytes, list[tuple[bytes, list[bytes]]]]]

_XREADGROUP = b"XREADGROUP"
"""The command as bytes: redis-py has no callback for it, so it does not make a dict of each entry, which would merge
fields of the same name."""

Verb = Literal["claim", "settle", "cancel", "purge"]

_FAIR_NAMES: Mapping[Verb, scripts.Name] = {
    "claim": "claim_fair",
    "settle": "settle_fair",
    "cancel": "cancel_fair",
    "purge": "purge_fair",
}

CALL_FIELDS = 4
"""Number of fields of a detached call's hash that are not jobs, without `failed`, which it has if rows failed."""

_ACCEPTED = Admission()
_SETTLED: dict[int, Settled] = {1: "answered", 2: "unread", 0: "late", -1: "unwritable"}
_CANCEL_OUTCOMES: dict[int, CancelOutcome] = {2: "waiting", 1: "running", 0: "gone"}


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
        # Every call needs these names: they are made once.
        self._streams = keys.streams()
        self._bell = keys.bell()
        self._bucket, self._seen = keys.bucket(), keys.seen("")
        self._enqueue_keys = [keys.spec(), *self._streams, self._bucket, keys.paused(), keys.refused()]
        self._enqueue_keys.append(keys.metrics())
        self._claim_keys = [*self._streams, keys.paused(), keys.workers(), keys.trail()]
        self._settle_keys = [*self._streams, keys.dead(), keys.trail(), keys.cancelled(), keys.metrics()]
        self._settle_keys.append(keys.webhooks())
        by_tenant = [kind(each) for kind in (keys.index, keys.turn, keys.past, keys.parked) for each in PRIORITIES]
        self._fair_keys = [keys.spec(), self._bell, keys.in_flight(), keys.tenants(), *by_tenant]
        self._fairness: str | None = None
        self._result_ttl_ms = result_ttl_ms
        self._unread_bytes = unread_bytes

    def forget_fairness(self) -> None:
        """Lets the next claim read again whether the service has `fair`. From any thread."""
        self._fairness = None

    def _read_fairness(self) -> str:
        """Returns FAIR, WAS_FAIR or "": a service that is or was fair has scripts that look after its index."""
        fairness = self._fairness
        if fairness is None:
            fairness = cast(bytes, self._client.hget(self._keys.spec(), FAIR_FIELD) or b"").decode()
            self._fairness = fairness
        return fairness

    def _run(self, name: Verb, keys: list[str], args: Sequence[scripts.Argument]) -> Any:
        if self._read_fairness():
            return scripts.run(self._client, _FAIR_NAMES[name], [*keys, *self._fair_keys], args)
        return scripts.run(self._client, name, keys, args)

    def create_groups(self) -> None:
        """Creates streams and groups that are missing. A group starts at the first entry, so it skips no job."""
        for stream in (*self._streams, self._bell):
            try:
                self._client.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except redis.exceptions.ResponseError as error:
                # At maxmemory the server refuses the command even if the group exists. Then a worker may start.
                if "BUSYGROUP" not in str(error) and not self._has_group(stream):
                    raise

    def _has_group(self, stream: str) -> bool:
        try:
            return bool(self._client.xinfo_groups(stream))
        except redis.exceptions.ResponseError:
            return False

    def enqueue(self, groups: Sequence[Group]) -> list[Admission]:
        """Accepts or refuses each group as a whole. Sending the same jobs again changes nothing.

        One call takes at most MAX_JOBS_PER_CALL jobs and about MAX_BYTES_PER_CALL bytes. Raises BrokerUnavailable if a
        group is to be replicated and no replica confirmed it in time: the caller must send it again, but it may run.
        """
        keys, seen, args = self._enqueue_keys.copy(), self._seen, list[scripts.Argument]((len(groups),))
        now = time.monotonic()
        for priority, drafts, calls, _, refusals, call in groups:
            tenant = drafts[0].tenant
            keys.append(self._keys.bucket(tenant) if tenant else self._bucket)
            args += (STREAM_INDEX[priority], len(drafts), calls, refusals)
            if call is None:
                args.append("")
            else:
                keys.append(self._keys.call(call.id))
                args += (call.id, call.jobs, call.payload, "" if call.result_ttl_ms is None else call.result_ttl_ms)
            for draft in drafts:
                keys.append(seen + draft.id)
                args += _draft_args(draft, now)
        replicated = any(group.replicated for group in groups)
        if not self._fairness:
            try:
                return self._enqueue("enqueue", keys, args, replicated)
            except redis.exceptions.ResponseError as error:
                # No further command finds it out: most services are not fair.
                if not str(error).startswith("FAIR"):
                    raise
                self._fairness = FAIR
        return self._enqueue("enqueue_fair", [*keys, *self._fair_keys], args, replicated)

    def _enqueue(
        self,
        name: Literal["enqueue", "enqueue_fair"],
        keys: Sequence[str],
        args: Sequence[scripts.Argument],
        replicated: bool,
    ) -> list[Admission]:
        if not replicated:
            return [_admission(outcome) for outcome in scripts.run(self._client, name, keys, args)]
        outcomes, replicas = scripts.run_copied(self._client, name, keys, args, REPLICA_MS)
        admissions = [_admission(outcome) for outcome in outcomes]
        if not replicas and not all(admission.refused for admission in admissions):
            raise BrokerUnavailable(
                f"no replica confirmed within {REPLICA_MS} ms that it has the jobs of service {self._keys.service!r}",
                hint="see INFO replication on the master; redis.durability is replicated",
            )
        return admissions

    def claim(self, consumer: str, limit: ClaimBudget) -> Claimed:
        """Claims waiting jobs within `limit`, without blocking. A malformed entry becomes a claim without a job."""
        return decode_claimed([], self._run("claim", *self._claim_words(consumer, limit)))

    def wait(self, consumer: str, wait_s: float, limit: ClaimBudget) -> Claimed:
        """Blocks until a new job comes, at most `wait_s` seconds, and claims it and further jobs within `limit`.

        Each new job wakes one of the waiting workers. That job is the first claim, even if the service is paused. Jobs
        that were given back wake up to 4 workers. If the service has `fair`, a new job only wakes up to 16 workers.
        """
        block_ms = max(1, round(wait_s * 1000))
        keys, args = self._claim_words(consumer, limit)
        name: Literal["claim", "claim_fair"] = "claim"
        watched = [*self._streams, self._bell]
        if fairness := self._read_fairness():
            name, keys = "claim_fair", [*keys, *self._fair_keys]
            # The streams would give out their oldest job, whoever's turn it is.
            watched = [self._bell] if fairness == FAIR else watched
        command: list[scripts.Argument] = [_XREADGROUP, "GROUP", GROUP, consumer, "COUNT", 1, "BLOCK", block_ms]
        command += ["STREAMS", *watched, *([">"] * len(watched))]
        woken, rest = scripts.run_after(self._client, command, name, keys, args)
        # UNBLOCKED is the error of Redis 7.0 if a stream is deleted meanwhile. The next claim raises the reason.
        if isinstance(woken, Exception) and "UNBLOCKED" not in str(woken):
            raise woken
        delivered = [] if isinstance(woken, Exception) else cast(Delivered, woken or [])
        claims = []
        for stream, entries in delivered:
            key = stream.decode()
            if key == self._bell:
                self._silence([entry for entry, _ in entries])
                continue
            number = self._streams.index(key) + 1
            claims += [decode_claim(number, entry, flat, 0.0) for entry, flat in entries]
        return decode_claimed(claims, rest)

    def _silence(self, rings: Sequence[bytes]) -> None:
        """Removes what the bell delivered: the claim after it has taken the jobs that were given back."""
        pipe = self._client.pipeline(transaction=False)
        pipe.xack(self._bell, GROUP, *rings)
        pipe.xdel(self._bell, *rings)
        pipe.execute()

    def _claim_words(self, consumer: str, limit: ClaimBudget) -> tuple[list[str], list[scripts.Argument]]:
        """Returns the keys and arguments of the claim script."""
        args: list[scripts.Argument] = [GROUP, consumer, RETURNED, limit.jobs, limit.rows, limit.tokens]
        args += (max(1, limit.live_workers), limit.held, limit.next_rows, int(limit.empty_handed))
        args += (limit.streams, limit.returned, *limit.saved, limit.max_attempts, LEASE_MS, *limit.job, *limit.large)
        return self._claim_keys, args

    def settle(self, settlements: Sequence[Settlement]) -> list[Settled]:
        """Writes each job's reply and deletes its entry, atomically and once: a second settlement changes nothing."""
        keys, jobs = self._settle_keys.copy(), list[str]()
        # Most replies have the same destination: the stream of one client.
        destinations: dict[tuple[str, str, int, bool], int] = {}
        words: list[scripts.Argument] = []
        for address, reply, bury, failed in settlements:
            way = (*self._destination(address), address.streams)
            destination = destinations.setdefault(way, len(destinations) + 1)
            jobs.append(self._seen + address.job_id)
            if address.streams:
                jobs.append(self._keys.partial(address.job_id))
            if len(reply) > MAX_REPLY_BYTES:
                reply, failed = TOO_LARGE, {ReplyTooLarge.code: address.rows}
            rows = _rows_text(address.rows, failed) if failed else address.rows
            words += (address.name, destination, address.job_id, reply, bury, rows)
        args: list[scripts.Argument] = [GROUP, DEAD_LETTERS_KEPT, self._unread_bytes, UNREAD, len(destinations)]
        for kind, key, ttl, streams in destinations:
            keys.append(key)
            args += (kind, ttl, int(streams))
        keys += jobs
        args += words
        return [_SETTLED[outcome] for outcome in self._run("settle", keys, args)]

    def emit(self, consumer: str, emissions: Sequence[Emission]) -> list[int]:
        """Appends records of at most MAX_JOBS_PER_CALL jobs that `consumer` runs, and shows their text to clients.

        Returns the bytes of records that the server has for each job: `before` and the new ones, or fewer if it has
        lost some, and then nothing was appended; or LOST or DIVERGED. Sending the same again changes nothing.
        """
        keys = self._streams.copy()
        args: list[scripts.Argument] = [GROUP, consumer, MOST_UNREAD_DELTAS, REPLY_TTL_MS]
        for address, before, records, delta, forgives in emissions:
            kind, replies, _ = self._destination(address)
            keys += (self._keys.partial(address.job_id), self._seen + address.job_id, replies)
            shown = encode_delta(delta) if delta.text and kind == "stream" else b""
            args += (address.name, address.job_id, kind if shown else "none", before, records, shown, int(forgives))
        return cast(list[int], scripts.run(self._client, "emit", keys, args))

    def partials(self, job_ids: Sequence[str]) -> list[bytes]:
        """Returns the encoded records of each job so far; empty bytes if there are none."""
        found = cast(list[bytes | None], self._client.mget([self._keys.partial(job_id) for job_id in job_ids]))
        return [records or b"" for records in found]

    def partial_behind(self, job_id: str, size: int) -> bytes:
        """Returns the encoded records of a job behind its first `size` bytes; empty bytes if there are none."""
        return cast(bytes, self._client.getrange(self._keys.partial(job_id), size, -1))

    def cancel(self, job_ids: Sequence[str], client: str, call: str = "") -> list[CancelOutcome]:
        """Cancels jobs of `client`, or of the detached `call`. Returns each job's state before the call.

        A "waiting" job is deleted, a "running" one ends at its worker's next heartbeat, a "gone" one is settled or
        never existed. The result of a detached job that waited is Cancelled. Clients get no reply: they have this
        outcome.
        """
        keys = [*self._streams, self._keys.cancelled(), self._keys.trail(), self._keys.metrics()]
        keys.append(self._keys.webhooks())
        args: list[scripts.Argument] = [GROUP, RETURNED, MARKS_KEPT_MS]
        result = b"" if client else CANCELLED
        for job_id in job_ids:
            kind, key, ttl = self._destination(Address("", job_id, client, call))
            # The script takes a key for each job, even if it writes nothing there.
            keys += (self._keys.seen(job_id), key, self._keys.partial(job_id))
            args += (job_id, "none" if client else kind, ttl, result)
        return [_CANCEL_OUTCOMES[outcome] for outcome in self._run("cancel", keys, args)]

    def purge(self) -> int:
        """Deletes all jobs that wait now, and answers each with Cancelled. Returns how many. Running jobs go on."""
        # Only up to the current newest entry: otherwise a steady flow of new jobs would make it endless.
        ends = [cast(Entries, self._client.xrevrange(stream, count=1)) for stream in self._streams]
        return sum([self._purge(each, end[0][0]) for each, end in zip(PRIORITIES, ends, strict=True) if end])

    def _purge(self, priority: Priority, last: bytes) -> int:
        stream, purged, after = self._keys.stream(priority), 0, "-"
        while page := cast(Entries, self._client.xrange(stream, after, last, count=MAX_JOBS_PER_CALL)):
            keys = [*self._streams, self._keys.trail(), self._keys.metrics(), self._keys.webhooks()]
            args: list[scripts.Argument] = [GROUP, RETURNED, self._unread_bytes]
            for entry, fields in page:
                address, job, *_ = decode_claim(STREAM_INDEX[priority], entry, flat_fields(fields), 0.0)
                kind, key, ttl = self._destination(address)
                keys += (key, self._keys.seen(address.job_id), self._keys.partial(address.job_id))
                deadline = job.deadline if job else 0
                args += (STREAM_INDEX[priority], address.entry, address.job_id, kind, ttl, deadline, PURGED)
                args.append(address.rows)
            purged += sum(self._run("purge", keys, args))
            after = f"({page[-1][0].decode()}"
        return purged

    def sizes(self) -> dict[Priority, int]:
        """Counts the jobs of each priority that wait or run."""
        pipe = self._client.pipeline(transaction=False)
        for stream in self._streams:
            pipe.xlen(stream)
        return dict(zip(PRIORITIES, cast(list[int], pipe.execute()), strict=True))

    def submitted(self, call: str) -> Submitted | None:
        """Returns the state of a detached call; None if its results have expired or it never existed."""
        pipe = self._client.pipeline(transaction=False)
        pipe.hmget(self._keys.call(call), ["payload", "left", "failed"])
        pipe.hlen(self._keys.call(call))
        (payload, unanswered, failed), fields = pipe.execute()
        if not (payload and unanswered):
            return None
        return Submitted(payload.decode(), fields - CALL_FIELDS - (failed is not None) - int(unanswered))

    def results(self, call: str, job_ids: Sequence[str]) -> list[bytes | None]:
        """Returns the encoded replies to jobs of a detached call, None for each job that is not answered."""
        found = cast(list[bytes | None], self._client.hmget(self._keys.call(call), list(job_ids)))
        return [reply or None for reply in found]

    def forget(self, call: str) -> None:
        """Lets the results of a detached call expire now. To be called when all of its jobs are answered."""
        self._client.pexpire(self._keys.call(call), 1)

    def _destination(self, address: Address) -> tuple[str, str, int]:
        """Returns the kind and key that a job's reply is written to, and its ttl, ms."""
        # Built from validated ids: if entries named keys, a client could make the worker write to any key.
        if not address.job_id:
            return "none", self._keys.dead(), 0
        if address.client:
            return "stream", self._keys.reply(address.client), REPLY_TTL_MS
        if address.call:
            return "hash", self._keys.call(address.call), self._result_ttl_ms
        return "string", self._keys.result(address.job_id), self._result_ttl_ms


def _rows_text(rows: int, failed: Mapping[str, int]) -> str:
    """Returns the rows without an error, then each error code and its rows, as the script takes them."""
    good = max(0, rows - sum(failed.values()))
    return " ".join([str(good), *(f"{code} {count}" for code, count in failed.items())])


def _remaining(moment: float | None, now: float) -> int | str:
    return "" if moment is None else round(min(max(0.0, (moment - now) * 1000), LONGEST_MS))


def _draft_args(draft: Draft, now: float) -> tuple[scripts.Argument, ...]:
    job_id, op, rows, tokens, body, client, deadline, queue_by, tenant, trace = draft
    until, until_start = _remaining(deadline, now), _remaining(queue_by, now)
    return job_id, op, rows, tokens, until, until_start, client, tenant, trace, body


def _admission(outcome: list[int | bytes]) -> Admission:
    if outcome[0] != 0:
        return _ACCEPTED
    _, reason, retry_after_ms, limit = outcome
    return Admission(cast(Refusal, cast(bytes, reason).decode()), cast(int, retry_after_ms) / 1000, cast(int, limit))
