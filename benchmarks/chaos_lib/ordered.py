"""Ends of workers that somebody ordered, and whether one cost a job an attempt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from e2e.watch import Entry

from chaos_lib.journal import Journal, Turn
from millstream.broker.contract.keys import RETURNED

ATTEMPT = 2
"""What an attempt adds to a delivery count."""


@dataclass(frozen=True)
class Harm:
    """A fault of one kind, between two moments (server ms), whether it landed or not."""

    kind: str
    began: int
    ended: int


@dataclass(frozen=True)
class Hold:
    """What an entry was when its worker was stopped for good: its consumer and its delivery count."""

    consumer: str
    count: int


@dataclass(frozen=True)
class OrderedEnd:
    """Workers that were killed because somebody told their supervisor to stop, between two moments (server ms).

    `held` is all that these workers held.
    """

    began: int
    ended: int
    held: Mapping[Entry, Hold]


@dataclass(frozen=True)
class Cost:
    """What the server wrote down of one entry from the end of its worker on: its first turn is that worker's own."""

    entry: Entry
    hold: Hold
    turns: Sequence[Turn]

    @property
    def charged(self) -> bool:
        """Whether the ordered end cost an attempt: the next worker got the entry with one more.

        What that worker's own death costs later is no fault of the order.
        """
        return any(map(self._is_higher, self._until_next()))

    @property
    def charged_later(self) -> bool:
        """Whether the end of a later worker cost an attempt, and not the ordered one."""
        return not self.charged and any(map(self._is_higher, self.turns))

    @property
    def charged_at(self) -> int:
        """Server ms at which its count was first an attempt higher; of its last turn if it never was."""
        return next((turn.at for turn in self.turns if self._is_higher(turn)), self.turns[-1].at)

    def _is_higher(self, turn: Turn) -> bool:
        return turn.count >= self.hold.count + ATTEMPT

    def _until_next(self) -> Iterator[Turn]:
        for turn in self.turns:
            yield turn
            if turn.consumer not in (self.hold.consumer, RETURNED):
                return


def costs(end: OrderedEnd, journal: Journal) -> Iterator[Cost]:
    """What became of each entry that was held. One whose hold the server forgot is left out: it has no history."""
    for entry, hold in end.held.items():
        turns = journal.turns.get(entry, [])
        # The last one: a worker may give an entry back and take it again.
        own = [at for at, turn in enumerate(turns) if turn.consumer == hold.consumer]
        if own:
            yield Cost(entry, hold, turns[own[-1] :])


def told(cost: Cost, end: OrderedEnd, journal: Journal, poison: Collection[str], harms: Sequence[Harm]) -> str:
    """The evidence about one entry: its job, its turns since the order, the deaths, and what fell until the charge.

    Times are seconds since the order.
    """
    stream, entry_id = cost.entry
    job = journal.job_of.get(cost.entry, "unknown")
    turns = [
        f"{_since(end, turn.at)} {turn.consumer} {before.count} to {turn.count}"
        for before, turn in pairwise(cost.turns)
    ]
    deaths = [line.partition(" ")[2] for line in journal.trail.get(cost.entry, ())]
    meanwhile = [
        f"{harm.kind} {_since(end, harm.began)} to {_since(end, harm.ended)}"
        for harm in harms
        if harm.began <= cost.charged_at and harm.ended >= end.began
    ]
    return " | ".join(
        [
            f"{stream} {entry_id.decode()}, job {job}, {_kind(cost.entry, job, journal, poison)}",
            f"{cost.hold.consumer} held it at {cost.hold.count}, {', '.join(turns)}",
            f"charged for: {', '.join(deaths) or 'no death'}",
            f"its supervisor ended {_since(end, end.ended)}",
            f"meanwhile: {', '.join(meanwhile) or 'nothing'}",
        ]
    )


def _kind(entry: Entry, job: str, journal: Journal, poison: Collection[str]) -> str:
    """Whether the job kills its workers, or was charged together with one that does."""
    if job in poison:
        return "poison"
    beside = {each for batch in journal.batches.values() if entry in batch for each in batch}
    return "beside poison" if any(journal.job_of.get(each) in poison for each in beside) else "no poison"


def _since(end: OrderedEnd, moment: int) -> str:
    return f"{(moment - end.began) / 1000:+.2f}"
