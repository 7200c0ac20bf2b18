"""Reading the reply stream of one client process."""

from __future__ import annotations

from typing import cast

import redis

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.transport.exchange import Words, exchange

READ_COUNT = 256

KEPT, KEPT_BYTES = 16, 65_536
"""So many replies are left in the stream after they were read: a lone caller's need no second command each."""

_START = b"0-0"
_NAMES = (b"id", b"reply")

_XREAD = b"XREAD"
"""As bytes the library has no callback for it, and makes no dict of each entry."""


class Replies:
    """The replies to one client from one service. Not thread-safe: one reader thread owns it.

    A read first deletes what the reads before it returned, once that is worth a command. So the stream holds little
    more than what is unread, and reading it from its start after any doubt (a cut connection, a server clock that
    stepped back) repeats nothing that was returned.
    """

    def __init__(self, client: redis.Redis, keys: ServiceKeys, client_id: str) -> None:
        self._client = client
        self._key = keys.reply(client_id)
        self._last = _START
        self._kept: list[bytes] = []
        self._kept_bytes = 0

    def read(self, wait_s: float) -> list[tuple[str, bytes]]:
        """(job id, encoded reply) pairs, oldest first; empty after `wait_s` without any. A pair can come twice."""
        last, self._last = self._last, _START
        kept = self._kept if last == _START or len(self._kept) >= KEPT or self._kept_bytes >= KEPT_BYTES else []
        block_ms = max(1, round(wait_s * 1000))
        commands: list[Words] = [(_XREAD, "COUNT", READ_COUNT, "BLOCK", block_ms, "STREAMS", self._key, last)]
        if kept:
            # One by one, not all up to the last one: where the stream was lost and its ids began anew, none is unread.
            commands.insert(0, ("XDEL", self._key, *kept))
        answers = exchange(self._client, *commands)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        streams = cast(list[tuple[bytes, list[tuple[bytes, list[bytes]]]]], answers[-1] or [])
        if kept:
            self._kept, self._kept_bytes = [], 0
        if not streams:
            return []
        entries = streams[0][1]
        self._last = entries[-1][0]
        self._kept += [entry for entry, _ in entries]
        self._kept_bytes += sum([len(part) for _, fields in entries for part in fields])
        # Entries that are no replies were not written by a worker: passed over, and deleted with the rest. Fields that
        # newer workers add come behind ours.
        return [
            (fields[1].decode(errors="replace"), fields[3]) for _, fields in entries if tuple(fields[0:4:2]) == _NAMES
        ]
