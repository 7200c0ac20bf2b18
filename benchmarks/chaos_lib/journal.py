"""What the server itself wrote down: its append-only file holds every effect of every script, with nothing sampled."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hiredis

from millstream.broker.contract.keys import RETURNED, ServiceKeys

_CHUNK = 1024 * 1024

Command = Sequence[bytes]
_RETURNED = RETURNED.encode()

_ONE_FIELD = 4
"""Words of an HSET that answers a job of a detached call; one that accepts jobs sets several fields."""
ATTEMPT = 2
"""What an attempt adds to a delivery count."""


@dataclass(frozen=True)
class OrderedEnd:
    """Workers that were killed because somebody told their supervisor to stop, between two moments (server ms).

    `held` are the delivery counts before, by the stream's key and the entry's id.
    """

    began: int
    ended: int
    held: Mapping[tuple[str, bytes], int]


@dataclass(frozen=True)
class GivenBack:
    """An entry that became one of those that any worker may take, at `at` (server ms), with its delivery count then."""

    at: int
    stream: str
    entry: bytes
    count: int


@dataclass
class Journal:
    """The life of every job of one service: `jobs` and `replies` count entries by job id, `results` too.

    `withdrawn` are jobs that went while no worker held them and no reply was written: their callers cancelled them.
    `deliveries` are those that count more than the first: (server ms, job id, delivery count). `given_back` are all
    entries that a worker lost or gave back.
    """

    jobs: Counter[str] = field(default_factory=Counter)
    replies: Counter[str] = field(default_factory=Counter)
    withdrawn: set[str] = field(default_factory=set)
    deliveries: list[tuple[int, str, int]] = field(default_factory=list)
    given_back: list[GivenBack] = field(default_factory=list)

    def attempts_before(self, moment: int) -> list[str]:
        """Jobs that were charged with an attempt, or half of one, before `moment`, server ms."""
        return sorted({job for at, job, _ in self.deliveries if at < moment})

    def charged_by(self, end: OrderedEnd) -> list[str]:
        """Entries whose return to the queue within that end made their count greater by an attempt."""
        found = [each for each in self.given_back if end.began <= each.at <= end.ended]
        return [
            f"{each.stream} {each.entry.decode()}: {before} to {each.count}"
            for each in found
            if (before := end.held.get((each.stream, each.entry))) is not None and each.count >= before + ATTEMPT
        ]

    @property
    def most_attempts(self) -> float:
        return max(((count - 1) / 2 for _, _, count in self.deliveries), default=0.0)


def read(data_dir: Path, keys: ServiceKeys) -> Journal:
    """Replay the append-only file of a server that was never rewriting it."""
    files = sorted(data_dir.glob("**/*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))
    return replay((command for path in files for command in _commands(path)), keys)


def replay(commands: Iterable[Command], keys: ServiceKeys) -> Journal:
    """What the write commands in `commands` say of the jobs of one service."""
    journal = Journal()
    streams = {stream.encode() for stream in keys.streams()}
    reply, call = keys.reply("").encode(), keys.call("").encode()
    entries: defaultdict[bytes, dict[bytes, str]] = defaultdict(dict)
    holders: dict[tuple[bytes, bytes], bytes] = {}
    for command in commands:
        name, key = command[0].upper(), command[1] if len(command) > 1 else b""
        if name == b"XADD" and key in streams:
            job = _field(command, b"id")
            entries[key][command[2]] = job
            journal.jobs[job] += 1
        elif name == b"XADD" and key.startswith(reply):
            journal.replies[_field(command, b"id")] += 1
        elif name == b"HSET" and key.startswith(call) and len(command) == _ONE_FIELD:
            journal.replies[command[2].decode()] += 1
        elif name == b"XDEL" and key in streams:
            waiting = [entry for entry in command[2:] if holders.get((key, entry), _RETURNED) == _RETURNED]
            jobs = {entries[key].get(entry, "unknown") for entry in waiting}
            journal.withdrawn |= {job for job in jobs if not journal.replies[job]}
        elif name == b"XCLAIM" and key in streams:
            holders[key, command[5]] = command[3]
            at, count = int(_option(command, b"TIME")), int(_option(command, b"RETRYCOUNT"))
            if count > 1:
                journal.deliveries.append((at, entries[key].get(command[5], "unknown"), count))
            if command[3] == _RETURNED:
                journal.given_back.append(GivenBack(at, key.decode(), command[5], count))
    return journal


def _field(command: Command, name: bytes) -> str:
    """A field of XADD's entry."""
    fields = command[3:]
    return fields[fields.index(name) + 1].decode() if name in fields[::2] else "unknown"


def _option(command: Command, name: bytes) -> bytes:
    return command[command.index(name) + 1] if name in command else b"0"


def _commands(path: Path) -> Iterator[Command]:
    reader = hiredis.Reader()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            reader.feed(chunk)
            while (command := reader.gets()) is not False:
                if isinstance(command, list):
                    yield command
