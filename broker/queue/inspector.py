"""Reads the state of services for the CLI and metrics: depths, ages, workers, waiting entries. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import redis

from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.contract.keys import DEFAULT_PREFIX, GROUP, RETURNED, ServiceKeys
from millstream.broker.queue.announced import Announced, queue_announced, read_announced
from millstream.broker.queue.drains import Order, queue_drains, read_drains
from millstream.broker.queue.fair_index import oldest_indexed
from millstream.broker.queue.lease import is_live
from millstream.broker.queue.pause import Pause, queue_pause, read_pause
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.supervisors import SupervisorView, queue_supervisors, read_supervisors
from millstream.broker.queue.views import ServiceView, WorkerView
from millstream.broker.transport.connection import Connection, is_missing_group, translated

__all__ = ["Entry", "Inspector", "Peek", "ServiceView", "WorkerView"]

Fields = Mapping[bytes, bytes]
Entries = Sequence[tuple[bytes, Fields | None]]

_START = "0-0"
_CUT = b"cut_"


@dataclass(frozen=True, slots=True)
class Entry:
    """A stream entry, well-formed or not. Bytes that are not UTF-8 become backslash escapes."""

    id: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Peek:
    """The oldest waiting entries of one stream. `after` is the id of the last entry that was delivered to a worker."""

    stream: str
    after: str
    entries: Sequence[Entry]


class Inspector:
    """A read-only view of one server's services under one key prefix."""

    def __init__(self, connection: Connection, prefix: str = DEFAULT_PREFIX) -> None:
        self._connection = connection
        self._registry = Registry(connection, prefix)

    def services(self, names: Sequence[str] | None = None) -> list[ServiceView]:
        """Returns the views of these services, or of all registered ones, in two round trips for any number of them.

        The figures are not a snapshot: jobs may move between two commands. Raises BrokerUnavailable.
        """
        chosen = [self._registry.keys(name) for name in (self._registry.names() if names is None else names)]
        with translated(self._connection.safe_url):
            queues = self._queues(chosen)
            workers = self._workers(list(zip(chosen, queues, strict=True)))
        return [queue.view(keys.service, workers) for keys, queue in zip(chosen, queues, strict=True)]

    def peek(self, service: str, priority: Priority, count: int = 10) -> Peek:
        """Returns the oldest `count` waiting entries of a stream, first those that workers gave back.

        Raises BrokerUnavailable.
        """
        keys = self._registry.keys(service)
        stream = keys.stream(priority)
        with translated(self._connection.safe_url):
            after, returned = self._positions(stream, count)
            indexed = oldest_indexed(self._connection.client, keys, priority, count)
            pipe = self._connection.client.pipeline(transaction=False)
            for name in [*(entry_id.decode() for entry_id in returned), *indexed]:
                pipe.xrange(stream, name, name)
            pipe.xrange(stream, f"({after}", count=count)
            # An entry of the index may be behind the last id, too.
            found = dict(entry for entries in cast(list[Entries], pipe.execute()) for entry in entries)
        return Peek(stream, after, [_entry(entry_id, found[entry_id] or {}) for entry_id in list(found)[:count]])

    def _queues(self, services: Sequence[ServiceKeys]) -> list[_Queue]:
        pipe = self._connection.client.pipeline(transaction=False)
        for keys in services:
            for stream in keys.streams():
                pipe.xlen(stream)
                pipe.xpending(stream, GROUP)
                pipe.xrange(stream, count=1)
            # The time of each service: in a Cluster the node that has its keys writes its times.
            pipe.time()
            pipe.xlen(keys.dead())
            pipe.zrange(keys.workers(), 0, -1, withscores=True)
            pipe.hgetall(keys.refused())
            queue_pause(pipe, keys)
            queue_supervisors(pipe, keys)
            queue_drains(pipe, keys)
            queue_announced(pipe, keys)
        answers = iter(_answers(pipe))
        return [_Queue.read(answers) for _ in services]

    def _workers(self, queues: Sequence[tuple[ServiceKeys, _Queue]]) -> Mapping[tuple[str, str], WorkerView]:
        live = [(keys, consumer, queue.now) for keys, queue in queues for consumer in queue.live]
        if not live:
            return {}
        pipe = self._connection.client.pipeline(transaction=False)
        for keys, consumer, _ in live:
            pipe.hgetall(keys.worker(_text(consumer)))
        hashes = cast(list[Fields], pipe.execute())
        views = (_worker(consumer, fields, now) for (_, consumer, now), fields in zip(live, hashes, strict=True))
        return {(keys.service, view.consumer): view for (keys, *_), view in zip(live, views, strict=True)}

    def _positions(self, stream: str, count: int) -> tuple[str, list[bytes]]:
        """Returns the last id delivered to the group, and the ids of the oldest entries that were given back."""
        pipe = self._connection.client.pipeline(transaction=False)
        pipe.xinfo_groups(stream)
        pipe.xpending_range(stream, GROUP, min="-", max="+", count=count, consumername=RETURNED)
        groups, pending = _answers(pipe)
        after = (each["last-delivered-id"] for each in cast(list[dict[str, bytes]], groups or []) if _is_ours(each))
        returned = [each["message_id"] for each in cast(list[dict[str, bytes]], pending or [])]
        return next((entry_id.decode() for entry_id in after), _START), returned


@dataclass(frozen=True, slots=True)
class _Queue:
    """The figures of one service, at `now`, server ms. `oldest_at` and `deadline` are in server ms, too."""

    now: int
    waiting: Mapping[Priority, int]
    pending: Counter[str]
    oldest_at: int | None
    deadline: int | None
    live: Sequence[bytes]
    dead_letters: int
    refused: Mapping[str, int]
    paused: Pause | None
    supervisors: Sequence[SupervisorView]
    unsettled: Mapping[Priority, int]
    drained: Mapping[str, Order]
    announced: Announced

    @classmethod
    def read(cls, answers: Iterator[object]) -> _Queue:
        waiting: dict[Priority, int] = {}
        pending: Counter[str] = Counter()
        oldest, deadlines = list[int](), list[int]()
        unsettled: dict[Priority, int] = {}
        for priority in PRIORITIES:
            length, group, first = islice(answers, 3)
            claimed = _pending(group)
            unsettled[priority] = cast(int, length)
            waiting[priority] = max(0, cast(int, length) - claimed.total())
            pending += claimed
            oldest += _times(cast(Entries, first), b"at")
            deadlines += _times(cast(Entries, first), b"deadline")
        time, dead_letters, beats, refusals, pause, left_ms, states, drains, *announced = islice(answers, 11)
        now = _ms(time)
        refused = {_text(reason): _count(cast(Fields, refusals), reason) for reason in cast(Fields, refusals)}
        live = [name for name, beat in cast(list[tuple[bytes, float]], beats) if is_live(beat, now)]
        depth = cast(int, dead_letters)
        return cls(
            now,
            waiting,
            pending,
            min(oldest, default=None),
            min(deadlines, default=None),
            live,
            depth,
            refused,
            paused=read_pause(pause, left_ms),
            supervisors=read_supervisors(states, now),
            unsettled=unsettled,
            drained=read_drains(drains),
            announced=read_announced(announced, now),
        )

    def view(self, service: str, workers: Mapping[tuple[str, str], WorkerView]) -> ServiceView:
        return ServiceView(
            name=service,
            waiting=self.waiting,
            held={consumer: count for consumer, count in self.pending.items() if consumer != RETURNED},
            returned=self.pending[RETURNED],
            oldest_ms=None if self.oldest_at is None else max(0, self.now - self.oldest_at),
            workers=[workers[service, _text(consumer)] for consumer in self.live],
            dead_letters=self.dead_letters,
            paused=self.paused,
            refused=self.refused,
            supervisors=self.supervisors,
            unsettled=self.unsettled,
            drained=self.drained,
            announced=self.announced,
            deadline_ms=None if self.deadline is None else self.deadline - self.now,
        )


def _answers(pipe: redis.client.Pipeline) -> list[object]:
    """Returns the pipeline's replies; None if a stream or group does not exist yet. Raises any other error of them."""
    answers: list[object] = pipe.execute(raise_on_error=False)
    for at, answer in enumerate(answers):
        if isinstance(answer, Exception):
            # XINFO names a missing stream in other words than the other commands.
            if not is_missing_group(answer) and not str(answer).startswith("no such key"):
                raise answer
            answers[at] = None
    return answers


def _pending(group: object) -> Counter[str]:
    """Counts the entries that each consumer of the group owns."""
    summary = cast(dict[str, object], group or {})
    consumers = cast(list[dict[str, object]], summary.get("consumers") or [])
    return Counter({_text(cast(bytes, each["name"])): cast(int, each["pending"]) for each in consumers})


def _times(first: Entries, field: bytes) -> list[int]:
    """Returns the time in a field of the entry, server ms; empty if there is no entry or it has no valid time."""
    return [int(at) for _, fields in first if (at := (fields or {}).get(field, b"")).isdigit() and len(at) <= 16]


def _worker(consumer: bytes, fields: Fields, now: int) -> WorkerView:
    return WorkerView(
        consumer=_text(consumer),
        state=_text(fields.get(b"state", b"unknown")),
        host=_text(fields.get(b"host", b"")),
        pid=_count(fields, b"pid"),
        device=_text(fields.get(b"device", b"")),
        fingerprint=_text(fields.get(b"fingerprint", b"")),
        beat_age_ms=max(0, now - (_count(fields, b"beat") or now)),
        age_ms=_count(fields, b"age_ms"),
        running=_count(fields, b"running"),
        running_ms=_count(fields, b"running_ms"),
        past=_text(fields.get(b"past", b"")),
        jobs=_count(fields, b"jobs"),
        rows=_count(fields, b"rows"),
        forwards=_count(fields, b"forwards"),
        tokens=_count(fields, b"tokens"),
        padded=_count(fields, b"padded"),
        errors=_count(fields, b"errors"),
        late=_count(fields, b"late"),
        busy_ms=_count(fields, b"busy_ms"),
        batch_tokens=_count(fields, b"batch_tokens"),
        text_tokens=_count(fields, b"text_tokens"),
        threads=_count(fields, b"threads"),
        cuts={_text(name[len(_CUT) :]): _count(fields, name) for name in fields if name.startswith(_CUT)},
        resident=fields.get(b"resident") != b"0",
        memory=_count(fields, b"memory"),
        loads=_count(fields, b"loads"),
        loads_minute=_count(fields, b"loads_minute"),
    )


def _entry(entry_id: bytes, fields: Fields) -> Entry:
    return Entry(_text(entry_id), {_text(name): _text(value) for name, value in fields.items()})


def _is_ours(group: Mapping[str, bytes]) -> bool:
    return group["name"] == GROUP.encode()


def _count(fields: Fields, name: bytes) -> int:
    value = fields.get(name, b"")
    return int(value) if value.isdigit() and len(value) <= 16 else 0


def _ms(time: object) -> int:
    seconds, micros = cast(tuple[int, int], time)
    return seconds * 1000 + micros // 1000


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")
