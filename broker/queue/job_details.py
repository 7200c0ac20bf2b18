"""The entry of a job that is not settled, how many jobs are before it, and how much text it has. Read-only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import redis

from millstream.broker.contract.errors import Malformed
from millstream.broker.contract.job import PRIORITIES
from millstream.broker.contract.keys import GROUP, RETURNED, ServiceKeys
from millstream.broker.contract.partial import decode_records, text_of
from millstream.broker.queue.admission import FAIR_FIELD
from millstream.broker.queue.fair_index import count_before
from millstream.broker.transport.connection import Connection, is_missing_group, translated

MOST_AHEAD = 1_000
"""Waiting entries of a stream that are read at most to find the place of a job: each comes with its body."""

_PAGE = 100

Entries = Sequence[tuple[bytes, Mapping[bytes, bytes]]]


@dataclass(frozen=True, slots=True)
class JobDetails:
    """Facts of a job in its stream. `deadline`: server ms, None if it has none.

    `ahead`: jobs of its priority that are claimed before it, None if it does not wait or more than MOST_AHEAD are. If
    the service has `fair`, only those of its tenant.
    `text`: characters generated so far, None if it has not generated any.
    """

    op: str
    tokens: int
    deadline: int | None
    tenant: str
    is_detached: bool
    ahead: int | None
    text: int | None


def read_details(connection: Connection, keys: ServiceKeys, job_ids: Sequence[str]) -> dict[str, JobDetails]:
    """Returns the details of those of these jobs that are in their stream. Raises BrokerUnavailable."""
    with translated(connection.safe_url):
        pipe = connection.client.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.get(keys.seen(job_id))
            pipe.get(keys.partial(job_id))
        answers = cast(list[bytes | None], pipe.execute())
        places = {job_id: place for job_id, seen in zip(job_ids, answers[::2], strict=True) if (place := _place(seen))}
        for stream, entry in places.values():
            pipe.xrange(keys.streams()[stream - 1], entry, entry)
        found = cast(list[Entries], pipe.execute()) if places else []
        entries = [dict(each[0][1]) if each else {} for each in found]
        tenants = dict(
            zip(
                places.values(),
                [fields.get(b"tenant", b"").decode(errors="replace") for fields in entries],
                strict=True,
            )
        )
        if connection.client.hget(keys.spec(), FAIR_FIELD):
            ahead = _count_own(connection, keys, tenants)
        else:
            ahead = _count_ahead(connection, keys, set(tenants))
    partials = dict(zip(job_ids, answers[1::2], strict=True))
    return {
        job_id: _details(dict(entries[0][1]), ahead.get(places[job_id]), partials[job_id])
        for job_id, entries in zip(places, found, strict=True)
        if entries
    }


Place = tuple[int, str]
"""Number of a stream, 1 to 3, and the id of an entry."""


def _place(seen: bytes | None) -> Place | None:
    stream, _, entry = (seen or b"").decode().partition(":")
    return (int(stream), entry) if entry and stream in ("1", "2", "3") else None


def _details(fields: Mapping[bytes, bytes], ahead: int | None, partial: bytes | None) -> JobDetails:
    def text(name: bytes) -> str:
        return fields.get(name, b"").decode(errors="backslashreplace")

    return JobDetails(
        op=text(b"op"),
        tokens=_whole(text(b"tokens")) or 0,
        deadline=_whole(text(b"deadline")),
        tenant=text(b"tenant"),
        is_detached=b"client" not in fields,
        ahead=ahead,
        text=_length(partial) if partial else None,
    )


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) <= 16 else None


def _length(partial: bytes) -> int | None:
    try:
        return len(text_of(decode_records(partial)))
    except Malformed:
        return None


def _count_own(connection: Connection, keys: ServiceKeys, tenants: Mapping[Place, str]) -> dict[Place, int]:
    """Returns how many jobs of its tenant are claimed before each of these: the rest depends on the other tenants."""
    return {
        (stream, entry): count_before(connection.client, keys, PRIORITIES[stream - 1], tenant, entry)
        for (stream, entry), tenant in tenants.items()
    }


def _count_ahead(connection: Connection, keys: ServiceKeys, places: set[Place]) -> dict[Place, int]:
    """Returns how many jobs of its stream are claimed before each of these that waits: given-back ones come first."""
    found: dict[Place, int] = {}
    for number in {stream for stream, _ in places}:
        names = [entry for stream, entry in places if stream == number]
        found |= {(number, entry): at for entry, at in _count_in(connection, keys.streams()[number - 1], names).items()}
    return found


def _count_in(connection: Connection, stream: str, entries: Sequence[str]) -> dict[str, int]:
    missing, order = set(entries), _returned(connection, stream)
    after = _last_delivered(connection, stream)
    while not missing <= set(order) and len(order) < MOST_AHEAD:
        page = cast(Entries, connection.client.xrange(stream, f"({after}", count=_PAGE))
        if not page:
            break
        order += [entry.decode() for entry, _ in page]
        after = order[-1]
    return {entry: at for at, entry in enumerate(order) if entry in missing}


def _returned(connection: Connection, stream: str) -> list[str]:
    """Returns the entries that workers gave back, in the order in which they are claimed again."""
    try:
        found = connection.client.xpending_range(stream, GROUP, "-", "+", MOST_AHEAD, consumername=RETURNED)
    except redis.exceptions.ResponseError as error:
        # No worker was ever there: then nothing was delivered.
        if not is_missing_group(error):
            raise
        return []
    return [cast(bytes, each["message_id"]).decode() for each in cast(list[dict[str, object]], found)]


def _last_delivered(connection: Connection, stream: str) -> str:
    groups = cast(list[dict[str, bytes]], connection.client.xinfo_groups(stream))
    return next((each["last-delivered-id"].decode() for each in groups if each["name"] == GROUP.encode()), "0-0")
