"""Announcements that wait for their webhooks: taken by one sender, tried again later, ended once.

The consumer group remembers each entry that was taken: how long ago, and how often. So the time of the next attempt
lives on the server, and an entry that a dead sender had taken comes due as one whose attempt failed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, cast

import redis

from millstream.broker.contract.errors import Malformed
from millstream.broker.contract.keys import GROUP, ServiceKeys
from millstream.broker.contract.webhooks import FIRST_RETRY_S, GIVEN_UP_S, Announcement, retry_after_s
from millstream.broker.queue.metrics import KEPT_MS
from millstream.broker.transport.cluster import owner
from millstream.broker.transport.connection import is_missing_group

log = logging.getLogger(__name__)

STATE_KEPT_MS = 86_400_000
"""Lifetime of the state of a webhook after its last attempt, ms."""

_CONSUMER = "senders"
"""All senders share one consumer: an entry belongs to the one that took it last, for FIRST_RETRY_S at least."""

_PAGE = 1_000

Entries = Sequence[tuple[bytes, dict[bytes, bytes]]]
Step = Literal["delivered", "retrying", "given up"]


@dataclass(frozen=True, slots=True)
class WebhookState:
    """How the last attempt ended. `at` is ms of the server's clock, `reason` why it failed."""

    step: Step
    attempt: int
    at: int
    reason: str = ""


class Webhooks:
    """The announcements of one service, over one client."""

    def __init__(self, client: redis.Redis, keys: ServiceKeys) -> None:
        self._client = client
        self._keys = keys
        self._stream = keys.webhooks()

    def take(self, most: int, held: Collection[str]) -> list[Announcement]:
        """Takes at most `most` new announcements, and as many whose next attempt is due. `held` are entries taken here.

        Each that was taken counts as an attempt that began now.
        """
        if most <= 0 or not self._client.xlen(self._stream):
            return []
        try:
            return [*self._take_new(most), *self._take_due(most, held)]
        except redis.exceptions.ResponseError as error:
            # The stream expires with its group. The scripts that write it make no group.
            if not is_missing_group(error):
                raise
        self._create_group()
        return self._take_new(most)

    def _create_group(self) -> None:
        try:
            self._client.xgroup_create(self._stream, GROUP, id="0")
        except redis.exceptions.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _take_new(self, most: int) -> list[Announcement]:
        found = self._client.xreadgroup(GROUP, _CONSUMER, {self._stream: ">"}, count=most)
        streams = cast(Sequence[tuple[bytes, Entries]], found or [])
        return [each for _, entries in streams for each in self._decode(entries, {})]

    def _take_due(self, most: int, held: Collection[str]) -> list[Announcement]:
        attempts = self._find_due(most, held)
        if not attempts:
            return []
        # Another sender may have taken one meanwhile: then it is not idle any more.
        idle_ms = round(FIRST_RETRY_S * 1000)
        found = self._client.xclaim(self._stream, GROUP, _CONSUMER, idle_ms, list(attempts))
        # Redis 6.2 gives an entry that was trimmed without an id.
        return self._decode([each for each in cast(Entries, found) if each[0]], attempts)

    def _find_due(self, most: int, held: Collection[str]) -> dict[str, int]:
        """Returns the entries whose next attempt is due, oldest first, and the number of that attempt."""
        due: dict[str, int] = {}
        after, page = "-", _PAGE
        while page == _PAGE and len(due) < most:
            found = self._client.xpending_range(
                self._stream, GROUP, after, "+", _PAGE, idle=round(FIRST_RETRY_S * 1000)
            )
            for each in cast(Sequence[Mapping[str, object]], found):
                entry, idle = cast(bytes, each["message_id"]).decode(), cast(int, each["time_since_delivered"])
                attempts = cast(int, each["times_delivered"])
                if entry not in held and idle >= 1000 * retry_after_s(attempts, FIRST_RETRY_S) and len(due) < most:
                    due[entry] = attempts + 1
                after = f"({entry}"
            page = len(cast(Sequence[object], found))
        return due

    def _decode(self, entries: Entries, attempts: Mapping[str, int]) -> list[Announcement]:
        announcements = []
        for entry_id, fields in entries:
            entry = entry_id.decode()
            try:
                announcements.append(Announcement.of(self._keys.service, entry, fields, attempts.get(entry, 1)))
            except Malformed as error:
                log.error("service %s: entry %s of its webhooks is dropped: %s", self._keys.service, entry, error)
                self._remove(entry)
        return announcements

    def renew(self, entries: Sequence[str]) -> None:
        """Says that this sender still holds these entries. It is no attempt."""
        if entries:
            self._client.xclaim(self._stream, GROUP, _CONSUMER, 0, list(entries), idle=0, justid=True)

    def note_delivered(self, announcement: Announcement) -> None:
        """Ends an announcement whose receiver has accepted it."""
        self._end(announcement, WebhookState("delivered", announcement.attempt, self._now()))

    def note_failed(self, announcement: Announcement, reason: str) -> bool:
        """Notes a failed attempt. Returns whether it was the last one: then the announcement is given up."""
        now = self._now()
        is_last = now - announcement.finished_ms >= GIVEN_UP_S * 1000
        state = WebhookState("given up" if is_last else "retrying", announcement.attempt, now, reason)
        if is_last:
            self._end(announcement, state)
        else:
            self._write(announcement.call, state)
        return is_last

    def read_state(self, call: str) -> WebhookState | None:
        """Returns how the last attempt for a call ended; None if there was none, or it is too long ago."""
        found = cast(bytes | None, self._client.get(self._keys.webhook(call)))
        return WebhookState(**json.loads(found)) if found else None

    def _now(self) -> int:
        seconds, micros = owner(self._client, self._stream).time()
        return int(seconds) * 1000 + int(micros) // 1000

    def _end(self, announcement: Announcement, state: WebhookState) -> None:
        self._write(announcement.call, state)
        # Counted by the sender that removes the entry: another one may have sent the same announcement.
        if self._remove(announcement.entry):
            field = f"webhooks:{state.step.replace(' ', '_')}"
            if self._client.hincrby(self._keys.metrics(), field, 1) == 1:
                self._client.pexpire(self._keys.metrics(), KEPT_MS)

    def _write(self, call: str, state: WebhookState) -> None:
        text = json.dumps(asdict(replace(state, reason=state.reason[:200])))
        self._client.set(self._keys.webhook(call), text, px=STATE_KEPT_MS)

    def _remove(self, entry: str) -> bool:
        # XDEL first: a sender that dies between the two leaves no entry that nobody would take.
        removed = bool(self._client.xdel(self._stream, entry))
        self._client.xack(self._stream, GROUP, entry)
        return removed
