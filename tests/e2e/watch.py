"""What the server says of one service, read past the product's own code."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

from support import eventually

from millstream.broker.contract.keys import GROUP, ServiceKeys
from millstream.broker.queue.lease import LEASE_S
from millstream.broker.transport.connection import Connection, retrying

Entry = tuple[str, bytes]
"""A stream's key and an entry's id."""


class Watch:
    """Reads through a server's restarts."""

    def __init__(self, connection: Connection, keys: ServiceKeys) -> None:
        self._client = connection.client
        self._keys = keys

    def live(self) -> dict[str, int]:
        """Each consumer that beats, and its pid."""
        return {consumer: int(fields[b"pid"]) for consumer, fields in self.workers().items()}

    def workers(self) -> dict[str, Mapping[bytes, bytes]]:
        """What each consumer that beats published of itself."""
        return retrying(self._workers)

    def _workers(self) -> dict[str, Mapping[bytes, bytes]]:
        seconds, micros = self._client.time()
        oldest = seconds * 1000 + micros // 1000 - round(LEASE_S * 1000)
        consumers = cast(list[bytes], self._client.zrangebyscore(self._keys.workers(), oldest, "+inf"))
        found = {name.decode(): self._client.hgetall(self._keys.worker(name.decode())) for name in consumers}
        return {name: cast(Mapping[bytes, bytes], fields) for name, fields in found.items() if fields}

    def counted(self, field: str) -> dict[str, int]:
        """One counter of each consumer that beats."""
        return {consumer: int(fields[field.encode()]) for consumer, fields in self.workers().items()}

    def held(self, consumer: str | None = None) -> list[Entry]:
        """The pending entries of `consumer`, or of all."""
        return [entry for entry, _ in retrying(lambda: self._pending(consumer))]

    def deliveries(self, consumer: str) -> dict[Entry, int]:
        """The delivery count of each pending entry of `consumer`."""
        return dict(retrying(lambda: self._pending(consumer)))

    def attempts(self) -> float:
        """The most attempts that any pending job has behind it."""
        return max(((deliveries - 1) / 2 for _, deliveries in retrying(lambda: self._pending(None))), default=0.0)

    def charged(self, attempts: float) -> int:
        """How many pending jobs have just so many attempts behind them."""
        return sum(1 for _, deliveries in retrying(lambda: self._pending(None)) if (deliveries - 1) / 2 == attempts)

    def held_s(self, consumer: str) -> float:
        """Seconds since `consumer` took what it holds; 0 where it holds nothing."""
        pending = [
            cast(int, each["time_since_delivered"])
            for stream in self._keys.streams()
            for each in self._client.xpending_range(stream, GROUP, "-", "+", 1, consumer)
        ]
        return max(pending, default=0) / 1000

    def _pending(self, consumer: str | None) -> list[tuple[Entry, int]]:
        found = []
        for stream in self._keys.streams():
            for each in self._client.xpending_range(stream, GROUP, "-", "+", 100_000, consumer):
                found.append(((stream, cast(bytes, each["message_id"])), cast(int, each["times_delivered"])))
        return found

    def unsettled(self, entries: Collection[Entry], owners: Collection[str]) -> list[Entry]:
        """Those of `entries` that are neither settled nor held by one of `owners`."""
        pipe = self._client.pipeline(transaction=False)
        for stream, entry in entries:
            pipe.xpending_range(stream, GROUP, entry, entry, 1)
        answers = pipe.execute()
        return [
            entry
            for entry, pending in zip(entries, answers, strict=True)
            if pending and pending[0]["consumer"].decode() not in owners
        ]

    def depth(self) -> int:
        """Jobs in the streams: waiting or held."""
        return retrying(lambda: sum(self._client.xlen(stream) for stream in self._keys.streams()))

    def dead_letters(self) -> list[Mapping[bytes, bytes]]:
        letters = retrying(lambda: self._client.xrange(self._keys.dead()))
        return [fields for _, fields in cast(list[tuple[bytes, Mapping[bytes, bytes]]], letters)]


def freeze_with_work(watch: Watch, victims: Mapping[str, int], *, within_s: float = 10.0) -> list[Entry]:
    """Stop these workers (consumer -> pid) at a moment when each holds entries; what they hold.

    Raises ProcessLookupError if one has ended. Its entries stay its own until its supervisor sees that.
    """
    held: list[Entry] = []

    def frozen() -> bool:
        for pid in victims.values():
            os.kill(pid, signal.SIGSTOP)
        eventually(lambda: all(map(is_stopped, victims.values())))
        each = [watch.held(consumer) for consumer in victims]
        held[:] = [entry for entries in each for entry in entries]
        if all(each):
            return True
        for pid in victims.values():
            os.kill(pid, signal.SIGCONT)
        return False

    eventually(frozen, within_s=within_s)
    return held


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has reached all its threads. Raises ProcessLookupError if it has ended, also for a zombie."""
    try:
        stats = [(thread / "stat").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        # A thread that ended meanwhile, if it is not the whole process.
        os.kill(pid, 0)
        return False
    # After the name, which may have blanks of its own.
    states = {stat.rpartition(")")[2].split()[0] for stat in stats}
    if states & {"Z", "X"}:
        raise ProcessLookupError(f"process {pid} has ended")
    return states == {"T"}
