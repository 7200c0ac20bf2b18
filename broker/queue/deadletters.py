"""Dead letters: jobs that failed for good, stored with the reason, to be inspected, run again or removed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import redis

from millstream.broker.contract.codec import decode_inputs
from millstream.broker.contract.entry_codec import decode_entry
from millstream.broker.contract.errors import InvalidRequest, Malformed
from millstream.broker.contract.job import Draft, Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.stream_types import DetachedCall, Group
from millstream.broker.queue.streams import Streams
from millstream.broker.queue.submitter import deliver
from millstream.broker.transport.connection import Connection

_PAGE = 100
_ID = re.compile("[0-9]{1,16}-[0-9]{1,16}")
_WHOLE = re.compile("[0-9]{1,16}")
_ATTEMPTS = re.compile(r"[0-9]{1,9}(\.5)?")
_OURS = (b"reason", b"entry", b"buried", b"priority", b"attempts", b"consumer", b"history")
"""Fields that settle writes before those of the entry."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: the job's `fields`, `priority` and `entry` id as in its stream, and the reason.

    `buried_at` is ms of the server's clock, `consumer` the worker that held the job, `attempts` the number of runs that
    did not finish; each is None if the letter does not say. `history` has one line for each such run and each lost
    host: server ms, the worker, how it ended.
    """

    id: str
    reason: str
    entry: str
    buried_at: int | None
    priority: Priority
    attempts: float | None
    consumer: str | None
    history: Sequence[str]
    fields: Mapping[bytes, bytes]

    def texts(self) -> dict[str, str]:
        """Returns the fields as text, with backslash escapes for bytes that are not UTF-8."""
        return {
            name.decode(errors="backslashreplace"): value.decode(errors="backslashreplace")
            for name, value in self.fields.items()
        }


class DeadLetters:
    """The dead letters of one service, over one client.

    `replicated`: a requeued job counts as accepted only once a replica has it. `where` is the server's URL in errors.
    """

    def __init__(
        self, client: redis.Redis, keys: ServiceKeys, *, replicated: bool = False, where: str = "the queue's URL"
    ) -> None:
        self._where = where
        self._client = client
        self._replicated = replicated
        self._keys = keys
        self._streams = Streams(client, keys)

    @classmethod
    def open(cls, connection: Connection, keys: ServiceKeys) -> DeadLetters:
        """Returns the dead letters of a registered service. Raises UnknownService, BrokerUnavailable."""
        spec = Registry(connection, keys.prefix).read(keys.service)
        return cls(connection.client, keys, replicated=spec.replicated, where=connection.safe_url)

    def __len__(self) -> int:
        return int(self._client.xlen(self._keys.dead()))

    def page(self, count: int = 20, before: str | None = None) -> list[Letter]:
        """Returns at most `count` letters, newest first: the newest, or the newest of those older than `before`, an id.

        Raises InvalidRequest if `before` is not an id.
        """
        end = "+" if before is None else f"({_checked(before)}"
        entries = self._client.xrevrange(self._keys.dead(), end, "-", count=count)
        return [_letter(*each) for each in cast(list[tuple[bytes, dict[bytes, bytes]]], entries)]

    def __iter__(self) -> Iterator[Letter]:
        """Yields all letters that exist when it starts, newest first."""
        page = self.page(_PAGE)
        while page:
            yield from page
            page = self.page(_PAGE, before=page[-1].id)

    def up_to(self, letter_id: str) -> Iterator[Letter]:
        """Yields the letters that are not newer than `letter_id`, newest first.

        Raises InvalidRequest if it is no id.
        """
        page = self.page(_PAGE, before=_following(letter_id))
        while page:
            yield from page
            page = self.page(_PAGE, before=page[-1].id)

    def find(self, letter_id: str) -> Letter:
        """Returns the letter with this id. Raises InvalidRequest if there is none."""
        entries = self._client.xrange(self._keys.dead(), _checked(letter_id), letter_id)
        if not entries:
            raise InvalidRequest(
                f"service {self._keys.service!r} has no dead letter {letter_id}", hint="see `millstream dead ls`"
            )
        return _letter(*cast(list[tuple[bytes, dict[bytes, bytes]]], entries)[0])

    def requeue(self, letter: Letter, wait_s: float = 0.0) -> str:
        """Runs the job again, as a detached call of one job without a deadline. Returns the id of call and job.

        Deletes the letter once the job is accepted. Calling it again makes no second job. Waits at most `wait_s`
        seconds while the server refuses the job or is unreachable. Raises InvalidRequest if the letter is malformed,
        QueueFull, RateLimited, ServicePaused, UnknownService, BrokerUnavailable.
        """
        draft = _draft(self._keys, letter)
        call = DetachedCall(draft.id, 1, f"{draft.rows}x{draft.rows} ")
        group = Group(letter.priority, [draft], replicated=self._replicated, call=call)
        deliver(self._streams, self._where, self._keys.service, group, wait_s)
        self.remove([letter.id])
        return draft.id

    def remove(self, letter_ids: Sequence[str]) -> int:
        """Deletes these letters. Returns how many existed. Raises InvalidRequest if one of the ids is malformed."""
        return int(self._client.xdel(self._keys.dead(), *map(_checked, letter_ids)))

    def purge(self, until: str | None = None) -> int:
        """Deletes all letters, or those that are not newer than `until`, an id. Returns how many.

        Raises InvalidRequest if `until` is no id.
        """
        if until is None:
            return int(self._client.xtrim(self._keys.dead(), maxlen=0, approximate=False))
        return int(self._client.xtrim(self._keys.dead(), minid=_following(until), approximate=False))


def _draft(keys: ServiceKeys, letter: Letter) -> Draft:
    """Returns the letter's job as a new draft, without fields of newer clients, which are optional.

    Raises InvalidRequest if the job is malformed.
    """
    try:
        if b"cut" in letter.fields:
            raise Malformed("the letter does not have all of its entry")
        job = decode_entry([part for pair in letter.fields.items() for part in pair])
        decode_inputs(job.body, job.rows)
    except Malformed as error:
        raise InvalidRequest(
            f"dead letter {letter.id} cannot run again: it is malformed: {error}", hint="`millstream dead show` it"
        ) from None
    # An id derived from the letter: if the reply to an enqueue is lost, sending again makes no second job.
    job_id = hashlib.sha256(f"{keys.spec()}\0{letter.id}".encode()).hexdigest()[:32]
    return Draft(job_id, job.op, job.rows, job.tokens, job.body, tenant=job.tenant, trace=job.trace)


def _letter(letter_id: bytes, fields: Mapping[bytes, bytes]) -> Letter:
    # Not trusted: other programs can write to this stream, too.
    reason, entry, buried, priority, attempts, consumer, history = (
        fields.get(name, b"").decode(errors="backslashreplace") for name in _OURS
    )
    return Letter(
        id=letter_id.decode(),
        reason=reason,
        entry=entry,
        buried_at=int(buried) if _WHOLE.fullmatch(buried) else None,
        priority=Priority(priority) if priority in set(Priority) else Priority.NORMAL,
        attempts=float(attempts) if _ATTEMPTS.fullmatch(attempts) else None,
        consumer=consumer or None,
        history=history.splitlines(),
        fields={name: value for name, value in fields.items() if name not in _OURS},
    )


def _following(letter_id: str) -> str:
    """Returns the id that follows `letter_id` in the order of a stream."""
    ms, _, sequence = _checked(letter_id).partition("-")
    return f"{ms}-{int(sequence) + 1}"


def _checked(letter_id: str) -> str:
    if not _ID.fullmatch(letter_id):
        raise InvalidRequest(f"{letter_id[:80]!r} is not the id of a dead letter", hint="such as 1700000000000-0")
    return letter_id
