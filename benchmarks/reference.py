"""The raw loop that the queue is measured against: redis-py and hiredis, no product code, no promises.

A sender thread pipelines XADDs of the same fields, a worker process reads with XREADGROUP and pipelines XACK, XDEL
and XADD of the answer for each job, a reader thread hands each answer to its caller. Nothing here survives a fault.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import cast

import redis
from redis.typing import EncodableT, FieldT

JOBS_A_CALL = 128
READ_COUNT = 256
BLOCK_MS = 1_000
KEPT = 20_000
"""About how many answers the reply stream keeps: the loop does not trim what was read."""

JOBS, GROUP = "raw:jobs", "workers"
REPLY_BYTES_A_ROW = 1_536

_Entries = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]
Done = Callable[[bytes], object]


def connect(url: str) -> redis.Redis:
    client: redis.Redis = redis.Redis.from_url(url, protocol=2)
    return client


def fields(job_id: str, body: str, rows: int, client: str) -> dict[FieldT, EncodableT]:
    """The fields that a job of the product has, in the same order and of like size."""
    return {
        "v": 1,
        "id": job_id,
        "at": 1_000_000_000_000,
        "op": "echo",
        "rows": rows,
        "tokens": 52 * rows,
        "deadline": 1_000_000_000_000,
        "client": client,
        "body": body,
    }


class RawClient:
    """Sends jobs and hands their answers to whoever waits; thread-safe."""

    def __init__(self, url: str) -> None:
        self._id = secrets.token_hex(8)
        self._waiting: dict[bytes, Done] = {}
        self._ready: deque[tuple[str, str, int]] = deque()
        self._changed = threading.Condition()
        self._sending, self._reading = connect(url), connect(url)
        for work in (self._send, self._read):
            threading.Thread(target=work, daemon=True).start()

    def submit(self, texts: Sequence[str], done: Done) -> None:
        """`done` is called with the answer, in the reader's thread."""
        job_id = secrets.token_hex(16)
        self._waiting[job_id.encode()] = done
        with self._changed:
            self._ready.append((job_id, "\n".join(texts), len(texts)))
            self._changed.notify()

    def call(self, texts: Sequence[str]) -> bytes:
        answer: SimpleQueue[bytes] = SimpleQueue()
        self.submit(texts, answer.put)
        return answer.get()

    def send_only(self, texts: Sequence[str]) -> None:
        """As `submit`; nobody waits for the answer."""
        self.submit(texts, lambda _: None)

    def _send(self) -> None:
        while True:
            with self._changed:
                while not self._ready:
                    self._changed.wait()
                batch = [self._ready.popleft() for _ in range(min(JOBS_A_CALL, len(self._ready)))]
            pipe = self._sending.pipeline(transaction=False)
            for job_id, body, rows in batch:
                pipe.xadd(JOBS, fields(job_id, body, rows, self._id))
            pipe.execute()

    def _read(self) -> None:
        key, last = f"raw:reply:{self._id}", b"0-0"
        while True:
            got = cast(_Entries, self._reading.xread({key: last}, count=READ_COUNT, block=BLOCK_MS) or [])
            for entry, answer in got[0][1] if got else ():
                last = entry
                if done := self._waiting.pop(answer[b"id"], None):
                    done(answer[b"reply"])


def work(url: str) -> None:
    """The worker: claim up to JOBS_A_CALL jobs, answer each with 1.5 kB a row, for ever."""
    client = connect(url)
    with contextlib.suppress(redis.exceptions.ResponseError):
        client.xgroup_create(JOBS, GROUP, id="0", mkstream=True)
    row = b"\0" * REPLY_BYTES_A_ROW
    while True:
        got = cast(_Entries, client.xreadgroup(GROUP, "worker", {JOBS: ">"}, count=JOBS_A_CALL, block=BLOCK_MS) or [])
        pipe = client.pipeline(transaction=False)
        for entry, job in got[0][1] if got else ():
            pipe.xack(JOBS, GROUP, entry)
            pipe.xdel(JOBS, entry)
            answer: dict[FieldT, EncodableT] = {"id": job[b"id"], "reply": row * int(job[b"rows"])}
            pipe.xadd(f"raw:reply:{job[b'client'].decode()}", answer, maxlen=KEPT, approximate=True)
        if got:
            pipe.execute()


if __name__ == "__main__":
    work(sys.argv[1])
