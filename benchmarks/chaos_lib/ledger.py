"""What client processes write down, outside the product: a file each, a line a fact, read again when they are over.

A call's id travels in its payload, and the echo answers the payload: an answer proves whose it is.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

OK = "ok"
CANCELLED = "cancelled"


def rows_of(call: str, count: int) -> list[str]:
    """The texts of a call, told apart from those of every other."""
    return [f"{call} row {row} of {count} {'grain ' * (row % 7)}" for row in range(count)]


class Book:
    """One client process's file. A line is flushed before the call goes on, so that kill -9 loses no fact."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def sent(self, call: str, rows: Sequence[str]) -> None:
        """Before the product hears of it."""
        self._write("sent", call, hashlib.sha1("\n".join(rows).encode(), usedforsecurity=False).hexdigest())

    def accepted(self, call: str, where: str) -> None:
        """The product acknowledged it. `where` to look for the answer: the id of a detached call, or of the job."""
        self._write("accepted", call, where)

    def answered(self, call: str, outcome: str) -> None:
        """OK, CANCELLED, or what went wrong. Once for each answer that was seen."""
        self._write("answered", call, outcome)

    def close(self) -> None:
        self._file.close()

    def _write(self, *fact: str) -> None:
        with self._lock:
            self._file.write(json.dumps(fact) + "\n")
            self._file.flush()


@dataclass
class Account:
    """One client process, as its file tells it: call -> what is known of it."""

    name: str
    killed: bool = False
    sent: set[str] = field(default_factory=set)
    accepted: dict[str, str] = field(default_factory=dict)
    answers: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def unanswered(self) -> list[str]:
        """Calls it was not answered, whether or not it should have been."""
        return sorted(self.sent - self.answers.keys())


def read(path: Path, *, killed: bool) -> Account:
    """The account of a process that is over; the last line of a killed one may be torn."""
    account = Account(path.stem, killed)
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        kind, call, what = json.loads(line)
        if kind == "sent":
            account.sent.add(call)
        elif kind == "accepted":
            account.accepted[call] = what
        else:
            account.answers[call].append(what)
    return account
