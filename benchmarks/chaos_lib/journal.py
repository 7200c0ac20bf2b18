"""What the server itself wrote down: its append-only file holds every effect of every script, with nothing sampled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hiredis
from e2e.watch import Entry

from millstream.broker.contract.keys import RETURNED, ServiceKeys

_CHUNK = 1024 * 1024

Command = Sequence[bytes]

_ONE_FIELD = 4
"""Words of an HSET that answers a job of a detached call; one that accepts jobs sets several fields."""
_TRAIL_FIELDS = 6
"""Words of an HSET that notes a death in the trail: of an entry its deaths, and the batch of the last one."""


@dataclass(frozen=True)
class Turn:
    """From `at` on (server ms) an entry belongs to `consumer`, with this delivery count."""

    at: int
    consumer: str
    count: int


@dataclass
class Journal:
    """The life of every job of one service: `jobs` and `replies` count entries by job id, `results` too.

    `withdrawn` are jobs that went while no worker held them and no reply was written: their callers cancelled them.
    `deliveries` are those that count more than the first: (server ms, job id, delivery count). `job_of` names the job
    of each entry, and `turns` says who held it; the consumer of returned jobs does if no worker does. `trail` has a
    line for each death that an entry was charged for: time, consumer, how. `batches` are the entries that were charged
    together.
    """

    jobs: Counter[str] = field(default_factory=Counter)
    replies: Counter[str] = field(default_factory=Counter)
    withdrawn: set[str] = field(default_factory=set)
    deliveries: list[tuple[int, str, int]] = field(default_factory=list)
    job_of: dict[Entry, str] = field(default_factory=dict)
    turns: dict[Entry, list[Turn]] = field(default_factory=dict)
    trail: dict[Entry, list[str]] = field(default_factory=dict)
    batches: dict[str, set[Entry]] = field(default_factory=dict)

    def attempts_before(self, moment: int) -> list[str]:
        """Jobs that were charged with an attempt, or half of one, before `moment`, server ms."""
        return sorted({job for at, job, _ in self.deliveries if at < moment})

    def waits(self, entry: Entry) -> bool:
        """Whether no worker holds it."""
        turns = self.turns.get(entry)
        return not turns or turns[-1].consumer == RETURNED

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
    streams = {stream.encode(): stream for stream in keys.streams()}
    reply, call, trail = keys.reply("").encode(), keys.call("").encode(), keys.trail().encode()
    for command in commands:
        name, key = command[0].upper(), command[1] if len(command) > 1 else b""
        if name == b"XADD" and key in streams:
            _enter(journal, (streams[key], command[2]), _field(command, b"id"))
        elif name == b"XADD" and key.startswith(reply):
            journal.replies[_field(command, b"id")] += 1
        elif name == b"HSET" and key.startswith(call) and len(command) == _ONE_FIELD:
            journal.replies[command[2].decode()] += 1
        elif name == b"HSET" and key == trail and len(command) == _TRAIL_FIELDS:
            _note_death(journal, command, keys.streams())
        elif name == b"XDEL" and key in streams:
            waiting = [entry for each in command[2:] if journal.waits(entry := (streams[key], each))]
            jobs = {journal.job_of.get(entry, "unknown") for entry in waiting}
            journal.withdrawn |= {job for job in jobs if not journal.replies[job]}
        elif name == b"XCLAIM" and key in streams:
            at, count = int(_option(command, b"TIME")), int(_option(command, b"RETRYCOUNT"))
            _deliver(journal, (streams[key], command[5]), Turn(at, command[3].decode(), count))
    return journal


def _enter(journal: Journal, entry: Entry, job: str) -> None:
    journal.job_of[entry] = job
    journal.jobs[job] += 1


def _deliver(journal: Journal, entry: Entry, turn: Turn) -> None:
    if turn.count > 1:
        journal.deliveries.append((turn.at, journal.job_of.get(entry, "unknown"), turn.count))
    turns = journal.turns.setdefault(entry, [])
    # A worker that renews its lease delivers the entry to itself.
    if not turns or (turns[-1].consumer, turns[-1].count) != (turn.consumer, turn.count):
        turns.append(turn)


def _note_death(journal: Journal, command: Command, streams: Sequence[str]) -> None:
    """HSET trail 'stream:entry' lines 'stream:entry:batch' 'batch size until', as release and reclaim write it."""
    stream, _, entry_id = command[2].partition(b":")
    entry = (streams[int(stream) - 1], entry_id)
    journal.trail[entry] = command[3].decode().splitlines()
    journal.batches.setdefault(command[5].split()[0].decode(), set()).add(entry)


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
