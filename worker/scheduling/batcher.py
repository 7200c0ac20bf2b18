"""Chooses the rows that run together: a pure decision over a pool ordered by length. No I/O, no clock.

If a model pads its batches to their longest row, rows of similar length should run together, around the length of the
most urgent row. Measured on a long-tailed mix, batches of 64 in arrival order compute 3.6 times the tokens they hold.
If a model packs its batches, rows of all lengths run together without padding, so the most urgent rows are chosen.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import accumulate
from operator import attrgetter
from typing import Generic, Literal, TypeVar

T = TypeVar("T")

Cut = Literal["rows", "tokens", "time", "padding", "arrival"]
"""Reason why a micro-batch has no more rows: the limit of rows, of tokens or of time, or more padding than an extra
forward would cost, or no more rows of its rank waiting."""


def computed(lengths: Sequence[int], packs: bool) -> int:
    """Tokens that one forward over rows of these lengths computes, if the model `packs` them, else with padding."""
    return sum(lengths) if packs else max(lengths, default=0) * len(lengths)


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one forward: rows, and the tokens it computes, padding included. A row over the limit runs alone.

    `overhead`: fixed cost of a forward, in tokens; an extra forward costs that much. A model that `packs` runs rows of
    different lengths without padding them to the longest.
    """

    rows: int
    tokens: int
    overhead: float = 128.0
    packs: bool = False

    def computed(self, rows: Iterable[Row[T]]) -> int:
        """Tokens that one forward over `rows` computes."""
        return computed([row.tokens for row in rows], self.packs)


@dataclass(slots=True, eq=False)
class Row(Generic[T]):
    """One waiting row. A smaller `urgency` runs earlier: its rank, then the order of arrival. `owner` names its job."""

    tokens: int
    urgency: tuple[int, ...]
    owner: str
    index: int
    payload: T
    key: str = ""


class Pool(Generic[T]):
    """Rows that wait for their forward, each rank ordered by length. `count`: their number, `tokens`: their sum.

    `cut`: why the last batch has no more rows.
    """

    def __init__(self) -> None:
        self._ranks: dict[int, list[Row[T]]] = {}
        self.count = 0
        self.tokens = 0
        self.cut: Cut = "arrival"

    def __len__(self) -> int:
        return self.count

    def add(self, rows: Iterable[Row[T]]) -> None:
        for row in rows:
            insort(self._ranks.setdefault(row.urgency[0], []), row, key=_length)
            self.count += 1
            self.tokens += row.tokens

    def _subtract(self, rows: Sequence[Row[T]]) -> None:
        self.count -= len(rows)
        self.tokens -= sum([row.tokens for row in rows])

    def drop(self, owners: Collection[str]) -> list[Row[T]]:
        """Removes all rows of `owners` and returns them."""
        if not owners:
            return []
        dropped = [row for rows in self._ranks.values() for row in rows if row.owner in owners]
        for rows in self._ranks.values() if dropped else ():
            rows[:] = [row for row in rows if row.owner not in owners]
        self._subtract(dropped)
        return dropped

    def waiting(self, rank: int) -> int:
        """Number of waiting rows of `rank`."""
        return len(self._ranks.get(rank, ()))

    def ranks(self) -> list[int]:
        """The ranks that have waiting rows."""
        return [rank for rank, rows in self._ranks.items() if rows]

    def rows(self, rank: int) -> Sequence[Row[T]]:
        """The waiting rows of `rank`, by length."""
        return self._ranks.get(rank, ())

    def oldest(self, rank: int, budget: Budget) -> list[Row[T]]:
        """The oldest rows of `rank` that fit the budget together, in order; at least one. They stay in the pool."""
        rows = self._ranks.get(rank)
        return _oldest(rows, budget)[0] if rows else []

    def remove(self, rows: Sequence[Row[T]]) -> None:
        """Removes these rows."""
        removed = set(map(id, rows))
        for rank in {row.urgency[0] for row in rows}:
            self._ranks[rank][:] = [row for row in self._ranks[rank] if id(row) not in removed]
        self._subtract(rows)

    def first(self, rank: int) -> Row[T] | None:
        """The shortest row of `rank`; None if none waits."""
        return next(iter(self._ranks.get(rank, ())), None)

    def move(self, rank: int, to: int, rows: int) -> int:
        """Moves the most urgent rows of `rank`, at most `rows`, to the rank `to`. Returns their number."""
        waiting = self._ranks.get(rank, [])
        chosen = nsmallest(rows, range(len(waiting)), key=lambda at: waiting[at].urgency)
        moved = [waiting[at] for at in chosen]
        for at in sorted(chosen, reverse=True):
            del waiting[at]
        self._subtract(moved)
        self.add(replace(row, urgency=(to, *row.urgency[1:])) for row in moved)
        return len(moved)

    def take(self, budget: Budget, chosen: Sequence[Row[T]] = ()) -> list[Row[T]]:
        """Removes the next micro-batch and returns it.

        It has the most urgent row and the rows next to it in length that are worth padding together; if the model
        packs, the most urgent rows. All are of one rank: rows of a lower rank would delay an urgent one. The batch is
        empty only if the pool is, and over the budget only if a single row is. `chosen`, a result of `choose`, is taken
        if all of it still waits, no rank above it does, and the budget allows it.
        """
        rows = self._first()
        if chosen and _allowed(chosen, rows, budget):
            batch, place = list(chosen), None
        else:
            batch, place = self._pick(rows, budget)
        if place:
            del rows[place]
        else:
            batch_ids = set(map(id, batch))
            rows[:] = [row for row in rows if id(row) not in batch_ids]
        self._subtract(batch)
        return batch

    def choose(self, budget: Budget) -> list[Row[T]]:
        """The rows that `take` would return now. They stay in the pool."""
        return self._pick(self._first(), budget)[0]

    def _pick(self, rows: Sequence[Row[T]], budget: Budget) -> tuple[list[Row[T]], slice | None]:
        """The next micro-batch of `rows`, and its slice of them; None if it is not contiguous."""
        if not rows:
            return [], None
        if budget.packs:
            oldest, self.cut = _oldest(rows, budget)
            return oldest, None
        low, high, self.cut = _neighbours(rows, _most_urgent(rows), budget)
        place = slice(low, high + 1)
        return list(rows[place]), place

    def _first(self) -> list[Row[T]]:
        """Rows of the most urgent rank that has any."""
        return next((self._ranks[rank] for rank in sorted(self._ranks) if self._ranks[rank]), [])


def _allowed(chosen: Sequence[Row[T]], rows: Sequence[Row[T]], budget: Budget) -> bool:
    fits = len(chosen) == 1 or (len(chosen) <= budget.rows and budget.computed(chosen) <= budget.tokens)
    return fits and set(map(id, rows)).issuperset(map(id, chosen))


def _oldest(rows: Sequence[Row[T]], budget: Budget) -> tuple[list[Row[T]], Cut]:
    """The most urgent rows that fit, in order, and the reason why no more do."""
    batch = nsmallest(budget.rows, rows, key=_urgency)
    fitting = max(1, sum(tokens <= budget.tokens for tokens in accumulate(row.tokens for row in batch)))
    if fitting < len(batch):
        return batch[:fitting], "tokens"
    return batch, "rows" if len(batch) < len(rows) else "arrival"


def _neighbours(rows: Sequence[Row[T]], at: int, budget: Budget) -> tuple[int, int, Cut]:
    """Extends [low, high] around `at` while the share of real tokens in the cost rises. Returns also why it ended."""
    low = high = at
    real = rows[at].tokens
    share = real / (budget.overhead + real)
    for size in range(2, len(rows) + 1):
        if size > budget.rows:
            return low, high, "rows"
        # Share with one more row, below or above. `over`: the share if that row does not fit the budget.
        below = above = over = -1.0
        if low > 0:
            padded = size * rows[high].tokens
            below = (real + rows[low - 1].tokens) / (budget.overhead + padded)
            if padded > budget.tokens:
                below, over = -1.0, below
        if high + 1 < len(rows):
            padded = size * rows[high + 1].tokens
            above = (real + rows[high + 1].tokens) / (budget.overhead + padded)
            if padded > budget.tokens:
                above, over = -1.0, max(above, over)
        best = max(below, above)
        if best < share:
            return low, high, "tokens" if max(best, over) >= share else "padding"
        if above >= below:
            high += 1
            real += rows[high].tokens
        else:
            low -= 1
            real += rows[low].tokens
        share = best
    return low, high, "arrival"


# Implemented in C, which matters: they are called for every waiting row at every micro-batch.
_length = attrgetter("tokens")
_urgency = attrgetter("urgency")


def _most_urgent(rows: Sequence[Row[T]]) -> int:
    row = min(rows, key=_urgency)
    return rows.index(row, bisect_left(rows, row.tokens, key=_length))
