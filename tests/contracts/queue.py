"""One service's queue, as the contract tests drive it: short verbs over the real classes, on whatever server."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import redis

from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.job import Claim, Draft, Priority
from millstream.broker.contract.keys import GROUP, RETURNED, ServiceKeys
from millstream.broker.queue import scripts
from millstream.broker.queue.claims import ClaimBudget, Claimed
from millstream.broker.queue.inspector import Inspector, ServiceView
from millstream.broker.queue.lease import LEASE_S, Lease
from millstream.broker.queue.metrics import ServiceMetrics, decode_metrics
from millstream.broker.queue.stream_types import Admission, Group, Settled, Settlement
from millstream.broker.queue.streams import Streams
from millstream.broker.transport.connection import Connection

CALLER = "caller"
LEASE_MS = round(LEASE_S * 1000)


def draft(
    rows: int = 1,
    tokens: int = 3,
    *,
    client: str = CALLER,
    deadline: float | None = None,
    queue_by: float | None = None,
    tenant: str = "",
    trace: str = "",
) -> Draft:
    body = encode_inputs(["a b c"] * rows, {})
    return Draft(secrets.token_hex(16), "echo", rows, tokens, body, client, deadline, queue_by, tenant, trace)


@dataclass(frozen=True)
class Queue:
    """`client` talks to the server, `keys` are of a service that exists from `open` on."""

    client: redis.Redis
    keys: ServiceKeys
    streams: Streams = field(init=False)
    lease: Lease = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", Streams(self.client, self.keys, result_ttl_ms=60_000))
        object.__setattr__(self, "lease", Lease(self.client, self.keys))

    def open(self, max_queue_size: int = 1000) -> None:
        self.streams.create_groups()
        self.client.hset(self.keys.spec(), mapping={"version": 1, "max_queue_size": max_queue_size})

    def put(self, *drafts: Draft, priority: Priority = Priority.NORMAL) -> list[Draft]:
        """Enqueue each job by itself."""
        admissions = self.streams.enqueue([Group(priority, [each]) for each in drafts])
        assert admissions == [Admission()] * len(drafts)
        return list(drafts)

    def put_raw(self, fields: dict[bytes, bytes], priority: Priority = Priority.NORMAL, entry: str = "*") -> None:
        """An entry that no client of ours wrote."""
        self.client.xadd(self.keys.stream(priority), {name.decode(): value for name, value in fields.items()}, id=entry)

    def claim(
        self,
        consumer: str = "w1",
        *,
        jobs: int = 100,
        rows: int = 100,
        tokens: int = 1000,
        live_workers: int = 1,
        empty_handed: bool = True,
    ) -> Claimed:
        return self.streams.claim(consumer, ClaimBudget(jobs, rows, tokens, live_workers, empty_handed))

    def wait(self, consumer: str = "w1", wait_s: float = 0.001, jobs: int = 0) -> Claimed:
        """Sleep, and claim so many jobs beside the one that came."""
        return self.streams.wait(consumer, wait_s, ClaimBudget(jobs, rows=100, tokens=1000))

    def hold(self, consumer: str, *drafts: Draft) -> list[Claim]:
        """Enqueue `drafts` and claim them for `consumer`, which has beaten."""
        self.put(*drafts)
        self.lease.beat(consumer, {}, [])
        claims = self.claim(consumer).claims
        assert ids(claims) == [each.id for each in drafts]
        return claims

    def settle(self, claims: Sequence[Claim], reply: bytes = b"reply", bury: str = "") -> list[Settled]:
        return self.streams.settle([Settlement(claim.address, reply, bury) for claim in claims])

    def replies(self, client: str = CALLER) -> list[tuple[str, bytes]]:
        return [(fields[b"id"].decode(), fields[b"reply"]) for _, fields in self.entries(self.keys.reply(client))]

    def replies_only(self, client: str = CALLER) -> list[tuple[str, bytes]]:
        """The replies of a stream that may hold deltas, too."""
        entries = self.entries(self.keys.reply(client))
        return [(fields[b"id"].decode(), fields[b"reply"]) for _, fields in entries if b"reply" in fields]

    def dead_letters(self) -> list[dict[bytes, bytes]]:
        return [fields for _, fields in self.entries(self.keys.dead())]

    def jobs(self, priority: Priority = Priority.NORMAL) -> list[tuple[str, dict[bytes, bytes]]]:
        """The entries of a job stream as they lie there."""
        return self.entries(self.keys.stream(priority))

    def entries(self, key: str) -> list[tuple[str, dict[bytes, bytes]]]:
        entries = cast(list[tuple[bytes, dict[bytes, bytes]]], self.client.xrange(key))
        return [(entry.decode(), fields) for entry, fields in entries]

    def depth(self) -> int:
        """Jobs that wait or are held."""
        return sum(int(self.client.xlen(stream)) for stream in self.keys.streams())

    def held_by(self, consumer: str) -> list[str]:
        """The entries on `consumer`'s name, as the scripts name them."""
        return [
            f"{index}:{cast(bytes, each['message_id']).decode()}"
            for index, stream in enumerate(self.keys.streams(), start=1)
            for each in self.client.xpending_range(stream, GROUP, "-", "+", 1000, consumername=consumer)
        ]

    def idle_ms(self, claim: Claim) -> int:
        entry, stream = claim.address.entry, self.keys.stream(claim.address.priority)
        return int(self.client.xpending_range(stream, GROUP, entry, entry, 1)[0]["time_since_delivered"])

    def view(self) -> ServiceView:
        """The service as the inspector sees it."""
        connection = cast(Connection, SimpleNamespace(client=self.client, safe_url="here"))
        (seen,) = Inspector(connection, self.keys.prefix).services([self.keys.service])
        return seen

    def totals(self) -> ServiceMetrics:
        fields = cast(dict[bytes, bytes], self.client.hgetall(self.keys.metrics()))
        return decode_metrics(self.keys, fields)

    # -- what only time does otherwise -------------------------------------------------------------------------

    def now(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds * 1000 + micros // 1000)

    def age(self, consumer: str, claims: Sequence[Claim], idle_ms: int = 2 * LEASE_MS) -> None:
        """As if these entries had not been renewed for `idle_ms`."""
        for claim in claims:
            stream = self.keys.stream(claim.address.priority)
            self.client.xclaim(stream, GROUP, consumer, 0, [claim.address.entry], idle=idle_ms, justid=True)

    def silence(self, *consumers: str) -> None:
        """As if these workers' last beat were long ago."""
        self.client.zadd(self.keys.workers(), dict.fromkeys(consumers, self.now() - 2 * LEASE_MS))

    def passed(self, ms_ago: int, hold_ms: int = 0) -> None:
        """As if reclaim's last pass were `ms_ago`, with `hold_ms` of holding off still to come."""
        now = self.now()
        self.client.set(self.keys.reclaim(), f"{now - ms_ago}:{now + hold_ms if hold_ms else 0}", px=60_000)

    def last_pass(self) -> tuple[int, int]:
        """When reclaim last passed, and until when it holds off; server ms."""
        last, _, until = cast(bytes, self.client.get(self.keys.reclaim())).decode().partition(":")
        return int(last), int(until)

    def reclaim(self) -> tuple[str, int]:
        """One pass, with its state: early, holding or done."""
        keys = [*self.keys.streams(), self.keys.workers(), self.keys.reclaim(), self.keys.trail(), self.keys.bell()]
        state, returned = scripts.run(self.client, "reclaim", keys, [GROUP, RETURNED, LEASE_MS])
        return state.decode(), returned


def ids(claims: Sequence[Claim]) -> list[str]:
    return [claim.address.job_id for claim in claims]


def names(claims: Sequence[Claim]) -> list[str]:
    return [claim.address.name for claim in claims]
