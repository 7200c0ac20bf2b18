"""The engine: runs rows on a model, one step at a time. One step is one forward pass over the rows that it holds.

`one_shot.py` runs models that answer a row in one forward: embeddings, scores, a user's function. A model whose rows
grow over many steps has an engine of its own, see Generates in `worker/models/base.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from millstream.broker.contract.partial import Record
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import Outcome, Rows
from millstream.worker.scheduling.batcher import Budget, Row


class Step(NamedTuple):
    """Results of one step.

    `rows` are complete and leave the engine, with one outcome each. `records` are new output of rows, in order; a row
    that is complete needs none, because its outcome has the whole output. `ran` and `tokens`: rows and tokens that
    count as work done. `computed`: tokens of the forward, padding included; 0 if its time predicts no other forward's.
    `displaced` rows left the engine because their memory was needed: they are to be admitted again, and then go on.
    """

    rows: Rows
    outcomes: Sequence[Outcome]
    records: Sequence[tuple[Row[Prepared], Record]] = ()
    ran: int = 0
    tokens: int = 0
    computed: int = 0
    displaced: Rows = []  # noqa: RUF012 - never changed


class Engine(Protocol):
    """Rows in work on one device. Called by one thread."""

    @property
    def busy(self) -> bool:
        """Whether it holds rows that have no outcome yet."""
        ...

    def room(self) -> Budget | None:
        """Rows and tokens that may be admitted now; None if every step begins with a batch of its own."""
        ...

    def admit(self, rows: Rows) -> None:
        """Adds rows, which take part in the next step."""
        ...

    def step(self) -> Step:
        """Runs one forward. Raises nothing but what ends the process: a fault of a row is its outcome."""
        ...

    def abort(self, rows: Rows) -> None:
        """Drops rows. Does nothing for rows that it does not hold.

        A row whose output grows may be admitted again later; it then goes on behind that output.
        """
        ...

    def conclude(self, rows: Rows, reason: str) -> Sequence[Outcome]:
        """Ends rows before they are complete, whether it holds them or aborted them earlier.

        Returns their outcomes: the output so far, and `reason`.
        """
        ...


@runtime_checkable
class Remote(Protocol):
    """An engine whose rows run on a server."""

    @property
    def away(self) -> str:
        """Reason why the server cannot be reached; "" if it can."""
        ...

    def wake(self) -> None:
        """Ends the wait of a step, since rows can be admitted. Called from any thread."""
        ...
