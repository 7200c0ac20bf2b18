"""Reading the reply stream of one client process."""

from __future__ import annotations

from typing import cast

import redis

from millstream.broker.keys import ServiceKeys

READ_COUNT = 256
_START = b"0-0"
_NAMES = (b"id", b"reply")

_XREAD = b"XREAD"
"""As bytes the library has no callback for it, and makes no dict of each entry."""


class Replies:
    """The replies to one client from one service. Not thread-safe: one reader thread owns it.

    Every read first trims what the read before it returned, so the stream holds only what is unread, and reading it
    from its start after any doubt (a cut connection, a server clock that stepped back) repeats little.
    """

    def __init__(self, client: redis.Redis, keys: ServiceKeys, client_id: str) -> None:
        self._client = client
        self._key = keys.reply(client_id)
        self._last = _START

    def read(self, wait_s: float) -> list[tuple[str, bytes]]:
        """(job id, encoded reply) pairs, oldest first; empty after `wait_s` without any. A pair can come twice."""
        last, self._last = self._last, _START
        pipe = self._client.pipeline(transaction=False)
        if last != _START:
            pipe.xtrim(self._key, minid=_after(last), approximate=False)
        block_ms = max(1, round(wait_s * 1000))
        words = (_XREAD, "COUNT", READ_COUNT, "BLOCK", block_ms, "STREAMS", self._key, last)
        pipe.execute_command(*words)  # type: ignore[no-untyped-call]
        streams = cast(list[tuple[bytes, list[tuple[bytes, list[bytes]]]]], pipe.execute()[-1] or [])
        if not streams:
            return []
        entries = streams[0][1]
        self._last = entries[-1][0]
        # Entries that are no replies were not written by a worker: passed over, and trimmed with the rest.
        return [
            (fields[1].decode(errors="replace"), fields[3]) for _, fields in entries if tuple(fields[::2]) == _NAMES
        ]


def _after(entry_id: bytes) -> str:
    ms, _, seq = entry_id.decode().partition("-")
    return f"{ms}-{int(seq) + 1}"
