"""Reading the reply stream of one client process."""

from __future__ import annotations

from typing import cast

import redis

from millstream.broker.keys import ServiceKeys

READ_COUNT = 256
_START = b"0-0"


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
        pipe.xread({self._key: last}, count=READ_COUNT, block=max(1, round(wait_s * 1000)))
        streams = cast(list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]], pipe.execute()[-1] or [])
        if not streams:
            return []
        entries = streams[0][1]
        self._last = entries[-1][0]
        # Entries that are no replies were not written by a worker: passed over, and trimmed with the rest.
        replies = [(fields.get(b"id"), fields.get(b"reply")) for _, fields in entries]
        return [(job_id.decode(errors="replace"), reply) for job_id, reply in replies if job_id and reply is not None]


def _after(entry_id: bytes) -> str:
    ms, _, seq = entry_id.decode().partition("-")
    return f"{ms}-{int(seq) + 1}"
