"""A ledger outside the product: which jobs were sent, and every single reply the server holds for each of them."""

from __future__ import annotations

import random
import secrets
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import cast

from millstream.broker.contract.codec import decode_reply, encode_inputs
from millstream.broker.contract.job import Draft, Json, Priority, Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.stream_types import Group
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, Streams
from millstream.broker.transport.connection import Connection, retrying

READ_S = 1.0


class Ledger:
    """Sends jobs and counts replies with plain stream commands, so that a reply too many is seen too.

    `options` are those of all jobs.
    """

    def __init__(
        self,
        connection: Connection,
        keys: ServiceKeys,
        op: str,
        *,
        replicated: bool = False,
        options: Mapping[str, Json] = MappingProxyType({}),
    ) -> None:
        self._streams = Streams(connection.client, keys)
        self._client = connection.blocking(READ_S)
        self._client_id = secrets.token_hex(8)
        self._key = keys.reply(self._client_id)
        self._op = op
        self._replicated = replicated
        self._options = options
        self._last = b"0-0"
        self._changed = threading.Condition()
        self._closed = False
        self.sent: dict[str, list[str]] = {}
        self.replies: defaultdict[str, list[Reply]] = defaultdict(list)
        self._reader = threading.Thread(target=self._read_on, name="ledger")
        self._reader.start()

    def send(self, jobs: Sequence[Sequence[str]], priority: Priority = Priority.NORMAL) -> list[str]:
        """One job for each list of texts; their ids, once the server accepted all."""
        ids = [secrets.token_hex(16) for _ in jobs]
        self.sent.update({job: list(texts) for job, texts in zip(ids, jobs, strict=True)})
        drafted = [self._draft(job, texts) for job, texts in zip(ids, jobs, strict=True)]
        for start in range(0, len(drafted), MAX_JOBS_PER_CALL):
            drafts = drafted[start : start + MAX_JOBS_PER_CALL]
            self._enqueue(drafts, priority)
        return ids

    def _enqueue(self, drafts: Sequence[Draft], priority: Priority) -> None:
        (admission,) = retrying(lambda: self._streams.enqueue([Group(priority, drafts, replicated=self._replicated)]))
        assert not admission.refused, admission.refused

    def _draft(self, job: str, texts: Sequence[str]) -> Draft:
        tokens = sum(len(text) // 4 for text in texts)
        return Draft(job, self._op, len(texts), tokens, encode_inputs(texts, self._options), client=self._client_id)

    def wait_for(self, jobs: Sequence[str], *, within_s: float = 90.0) -> None:
        """Until each of `jobs` has a reply."""
        with self._changed:
            answered = self._changed.wait_for(lambda: all(job in self.replies for job in jobs), within_s)
            missing = [job for job in jobs if job not in self.replies]
        assert answered, f"{len(missing)} of {len(jobs)} jobs without a reply after {within_s:g} s: {missing[:3]}"

    @property
    def answered(self) -> int:
        """Jobs with at least one reply."""
        return len(self.replies)

    def has_answered(self, jobs: int) -> bool:
        return self.answered >= jobs

    def close(self) -> None:
        """Read what is there, then read no more."""
        with self._changed:
            self._closed = True
        self._reader.join()

    def answered_more_than_once(self) -> list[str]:
        return [job for job, replies in self.replies.items() if len(replies) > 1]

    def _read_on(self) -> None:
        while True:
            closed = self._closed
            if not retrying(self._read) and closed:
                return

    def _read(self) -> int:
        """Count the replies behind the last one counted: an entry that is read again is not a second reply."""
        answer = self._client.xread({self._key: self._last}, count=256, block=round(READ_S * 1000))
        streams = cast(list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]], answer or [])
        entries = streams[0][1] if streams else []
        with self._changed:
            for entry, fields in entries:
                # The others show a text that grows.
                if b"reply" in fields:
                    self.replies[fields[b"id"].decode()].append(decode_reply(fields[b"reply"]))
                self._last = entry
            self._changed.notify_all()
        return len(entries)


class Load:
    """Callers that each send a job of one or several known texts, wait for its reply, and start over."""

    def __init__(self, ledger: Ledger, texts: Sequence[str], threads: int) -> None:
        self.ledger = ledger
        self._texts = texts
        self._over = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._call, args=(seed,)) for seed in range(threads)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No new jobs; raises what a caller met."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _call(self, seed: int) -> None:
        chance = random.Random(seed)
        try:
            while not self._over.is_set():
                texts = chance.choices(self._texts, k=chance.choice((1, 1, 1, 3, 8)))
                self.ledger.wait_for(self.ledger.send([texts]))
        except BaseException as error:  # noqa: BLE001 - raised again by stop, in the test's own thread
            self._errors.append(error)


@contextmanager
def opened(
    connection: Connection, keys: ServiceKeys, op: str, options: Mapping[str, Json] = MappingProxyType({})
) -> Iterator[Ledger]:
    ledger = Ledger(connection, keys, op, options=options)
    try:
        yield ledger
    finally:
        ledger.close()
