"""A process that enqueues with the broker's verb and counts every reply: raw_callers.py URL SERVICE BOOK NAME PACE.

It reads its reply stream without ever trimming it, so that a reply too many is seen, as it would be nowhere else. Until
end of input; prints "calling" after a first answer.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import cast

from chaos_lib.ledger import CANCELLED, OK, Book, rows_of
from millstream.broker.contract.codec import decode_reply, encode_inputs
from millstream.broker.contract.errors import Cancelled
from millstream.broker.contract.job import PRIORITIES, Draft
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.stream_types import Group
from millstream.broker.queue.streams import Streams
from millstream.broker.transport.connection import Connection, retrying

THREADS = 4
READ_S = 1.0
CANCELLED_SHARE = 0.08

GONE_S = 60.0
"""A reply that has not come this long after its job was gone was never written: the job was cancelled."""


@dataclass(eq=False)
class Job:
    """One job under way."""

    id: str
    rows: list[str]
    cancelled: bool = False
    replied: threading.Event = field(default_factory=threading.Event)


class RawCallers:
    """Threads that each send a job, wait for its reply, and start over; one thread that reads."""

    def __init__(self, url: str, service: str, book: Book) -> None:
        self._connection = Connection(url, name="chaos-raw")
        keys = ServiceKeys(service)
        self._replicated = retrying(lambda: Registry(self._connection).read(service)).replicated
        self._streams = Streams(self._connection.client, keys)
        self._reading = self._connection.blocking(READ_S)
        self._id = secrets.token_hex(8)
        self._key = keys.reply(self._id)
        self._book = book
        self._jobs: dict[str, Job] = {}
        self.over = threading.Event()
        self.read_out = threading.Event()

    def call(self, chance: Random) -> None:
        job = self._drafted(chance)
        group = Group(chance.choice(PRIORITIES), [self._draft(job)], replicated=self._replicated)
        (admission,) = retrying(lambda: self._streams.enqueue([group]))
        if admission.refused:
            self._book.answered(job.id, f"refused: {admission.refused}")
            return
        self._book.accepted(job.id, job.id)
        if chance.random() < CANCELLED_SHARE:
            job.cancelled = True
            (outcome,) = retrying(lambda: self._streams.cancel([job.id], self._id))
            # Nobody answers a job that was cancelled while it waited; if the first try's answer was lost, it is "gone".
            if outcome == "waiting" or (outcome == "gone" and not job.replied.wait(GONE_S)):
                self._book.answered(job.id, CANCELLED)
                return
        job.replied.wait()

    def in_turn(self, name: str, pace_s: float) -> None:
        chance = Random(name)
        while not self.over.is_set():
            began = time.monotonic()
            self.call(chance)
            self.over.wait(max(0.0, chance.uniform(0, 2 * pace_s) - (time.monotonic() - began)))

    def read_on(self) -> None:
        """Write down every reply, once for each entry: one that is read again is not a second reply."""
        last = b"0-0"
        while True:
            over = self.read_out.is_set()
            entries = retrying(partial(self._entries, last))
            for entry, fields in entries:
                self._replied(fields)
                last = entry
            if over and not entries:
                return

    def _drafted(self, chance: Random) -> Job:
        job_id = secrets.token_hex(16)
        job = Job(job_id, rows_of(job_id, chance.choice((1, 1, 1, 4))))
        self._jobs[job.id] = job
        self._book.sent(job.id, job.rows)
        return job

    def _draft(self, job: Job) -> Draft:
        return Draft(job.id, "echo", len(job.rows), 8, encode_inputs(job.rows, {}), client=self._id)

    def _entries(self, last: bytes) -> list[tuple[bytes, dict[bytes, bytes]]]:
        answer = self._reading.xread({self._key: last}, count=256, block=round(READ_S * 1000))
        streams = cast(list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]], answer or [])
        return streams[0][1] if streams else []

    def _replied(self, fields: dict[bytes, bytes]) -> None:
        job = self._jobs[fields[b"id"].decode()]
        reply = decode_reply(fields[b"reply"])
        if reply.values == job.rows:
            self._book.answered(job.id, OK)
        elif isinstance(reply.error, Cancelled) and job.cancelled:
            self._book.answered(job.id, CANCELLED)
        else:
            self._book.answered(job.id, f"wrong: {reply.error or reply.values}"[:300])
        job.replied.set()


def main() -> None:
    url, service, path, name, pace_s = sys.argv[1:]
    book = Book(Path(path))
    callers = RawCallers(url, service, book)
    reader = threading.Thread(target=callers.read_on)
    reader.start()
    callers.call(Random(name))
    sys.stdout.write("calling\n")
    sys.stdout.flush()
    threads = [
        threading.Thread(target=callers.in_turn, args=(f"{name}-{each}", float(pace_s))) for each in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    callers.over.set()
    for thread in threads:
        thread.join()
    callers.read_out.set()
    reader.join()
    book.close()


if __name__ == "__main__":
    main()
