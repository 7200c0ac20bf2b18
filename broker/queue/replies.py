"""Reads the reply stream of one client process."""

from __future__ import annotations

from typing import NamedTuple, cast

import redis

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.transport.link import Words, exchange

READ_COUNT = 256
"""Most replies of one read."""

DELETE_COUNT, DELETE_BYTES = 16, 65_536
"""Number and bytes of returned replies at which the next read deletes them: one XDEL for many replies."""

_START = b"0-0"
_IS_FINAL = {(b"id", b"reply"): True, (b"id", b"delta"): False}
"""Names of an entry's first two fields -> whether it ends its job."""

_XREAD = b"XREAD"
"""The command as bytes: redis-py has no callback for it, so it does not make a dict of each entry."""


class Answer(NamedTuple):
    """Entry of a reply stream. `data`: the job's encoded reply if `final` is True, else a delta of its text."""

    job_id: str
    data: bytes
    final: bool


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

    def read(self, wait_s: float) -> list[Answer]:
        """Returns replies and deltas, oldest first; empty after `wait_s` seconds without one.

        Each can come twice. Raises what redis-py raises.
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
        # Other entries are ignored, and deleted with the rest: no worker wrote them. Newer workers add their fields
        # after these two.
        return [
            Answer(fields[1].decode(errors="replace"), fields[3], _IS_FINAL[names])
            for _, fields in entries
            if (names := tuple(fields[0:4:2])) in _IS_FINAL
        ]
