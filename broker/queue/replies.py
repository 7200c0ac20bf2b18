"""Reads the reply stream of one client process."""

from __future__ import annotations

from typing import cast

import redis

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.transport.link import Words, exchange

READ_COUNT = 256
"""Most replies of one read."""

DELETE_COUNT, DELETE_BYTES = 16, 65_536
"""Number and bytes of returned replies at which the next read deletes them: one XDEL for many replies."""

_START = b"0-0"
_NAMES = (b"id", b"reply")

_XREAD = b"XREAD"
"""The command as bytes: redis-py has no callback for it, so it does not make a dict of each entry."""


class Replies:
    """The replies to one client from one service. Not thread-safe: one reader thread owns it.

    A read first deletes the replies that earlier reads returned, once there are enough of them. After an error or an
    empty read it deletes them in any case, and reads the stream from its beginning: so no reply is skipped after a cut
    connection, or if the server's clock stepped back.
    """

    def __init__(self, client: redis.Redis, keys: ServiceKeys, client_id: str) -> None:
        self._client = client
        self._key = keys.reply(client_id)
        self._last = _START
        self._to_delete: list[bytes] = []
        self._to_delete_bytes = 0

    def read(self, wait_s: float) -> list[tuple[str, bytes]]:
        """Returns (job id, encoded reply) pairs, oldest first; empty after `wait_s` seconds without one.

        A pair can come twice. Raises what redis-py raises.
        """
        last, self._last = self._last, _START
        deletes = (
            self._to_delete
            if last == _START or len(self._to_delete) >= DELETE_COUNT or self._to_delete_bytes >= DELETE_BYTES
            else []
        )
        block_ms = max(1, round(wait_s * 1000))
        commands: list[Words] = [(_XREAD, "COUNT", READ_COUNT, "BLOCK", block_ms, "STREAMS", self._key, last)]
        if deletes:
            # By id, not by XTRIM: if the server lost the stream, new replies may have lower ids, and they are unread.
            commands.insert(0, ("XDEL", self._key, *deletes))
        answers = exchange(self._client, *commands)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        streams = cast(list[tuple[bytes, list[tuple[bytes, list[bytes]]]]], answers[-1] or [])
        if deletes:
            self._to_delete, self._to_delete_bytes = [], 0
        if not streams:
            return []
        entries = streams[0][1]
        self._last = entries[-1][0]
        self._to_delete += [entry for entry, _ in entries]
        self._to_delete_bytes += sum([len(part) for _, fields in entries for part in fields])
        # Entries that are not replies are ignored, and deleted with the rest: no worker wrote them. Newer workers add
        # their fields after these two.
        return [
            (fields[1].decode(errors="replace"), fields[3]) for _, fields in entries if tuple(fields[0:4:2]) == _NAMES
        ]
