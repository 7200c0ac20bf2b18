"""The interface between the worker and a model: three methods. Queue, batches, deadlines and faults stay outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from millstream.broker.config.load import Runtime
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Encoded, Json, Vectors

if TYPE_CHECKING:
    from millstream.broker.contract.partial import Record
    from millstream.worker.engines.base import Engine
    from millstream.worker.engines.upstream_limit import Shares

Result = Encoded | Json | MillstreamError
"""The result of one row in a forward: a vector [dim], a JSON value, or an error."""

NOT_FINITE = "the model answered NaN or infinity"

NO_OPTIONS: Mapping[str, Json] = MappingProxyType({})


ANY_LENGTH = 10**9
"""Tokens. A limit this high means no limit: some tokenizers name 10^30."""


class Limit(NamedTuple):
    """The longest text that a model reads, in tokens, special tokens included.

    `ran` is the length of the longest text that ran at the start, in tokens; 0 if none did.
    """

    tokens: int
    ran: int

    def __str__(self) -> str:
        if self.tokens >= ANY_LENGTH:
            return "texts of any length"
        most = f"{self.tokens} tokens a text"
        return most if self.ran >= self.tokens else f"{most}, {self.ran} were tried"


@dataclass(slots=True, eq=False)
class Prepared:
    """One row ready to run: its length in tokens, special tokens included, and its features for the model.

    `output_tokens`: tokens that earlier runs generated; the model reads them again.
    """

    tokens: int
    features: object
    truncated: bool = False
    output_tokens: int = 0


Upcoming = Callable[[], Sequence[Prepared]]
"""Returns the rows that probably run next; empty if no row waits."""


class Model(Protocol):
    """Weights on a device. `prepare` runs in the claimer thread while `forward` runs in the main thread."""

    op: str
    """The operation that its jobs name, for example "embed"."""

    fingerprint: str
    """Names the weights and how they run. Vectors of different fingerprints must not be mixed."""

    sample_options: Mapping[str, Json]
    """The job options to use with `samples`."""

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        """Returns for each input a row, or its own error, for example if it is not a string or too long."""
        ...

    def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json] | list[Result]:
        """Returns one result for each row, in order: float32 [rows, dim], or a list if results differ in kind.

        May raise any exception.
        """
        ...

    def samples(self, tokens: int) -> Sequence[Json]:
        """Returns one input of about `tokens` tokens, for the warm-up; empty if only callers know valid inputs."""
        ...


@runtime_checkable
class Adapts(Protocol):
    """A model whose rows depend on the limits of its service."""

    def adapt(self, runtime: Runtime) -> None:
        """Uses the pushed limits for all rows prepared from now on. Called from any thread."""
        ...


@runtime_checkable
class Foresees(Protocol):
    """A model that can prepare its next forward while one forward runs."""

    def foresee(self, upcoming: Upcoming) -> None:
        """Stores `upcoming`, which is called in the main thread. Called once, before the first forward."""
        ...


@runtime_checkable
class Laps(Protocol):
    """A model that prepares its rows one by one, when one row may take long."""

    def lap_by(self, lap: Callable[[], None]) -> None:
        """Stores `lap`, to be called before each row of `prepare`, in order.

        So each row has the full stall timeout, and a process that dies does so at a known row. Called once, before the
        first row.
        """
        ...


@runtime_checkable
class Reads(Protocol):
    """A model that reads texts up to a limited length."""

    limit: Limit


@runtime_checkable
class Placed(Protocol):
    """A model that names the kind of its device, for example "cpu", and its library, for example "torch"."""

    device_type: str
    backend: str


def packs(model: Model) -> bool:
    """Returns whether `model` has a true attribute `packs`: it runs rows of any lengths without padding."""
    return bool(getattr(model, "packs", False))


@runtime_checkable
class BringsEngine(Protocol):
    """A model that brings an engine of its own."""

    def start_engine(self) -> Engine:
        """Returns the engine that runs this model's rows. Called once, in the main thread."""
        ...


@runtime_checkable
class SharesSlots(Protocol):
    """A model whose server other workers use, too. It says where."""

    url: str

    def share_by(self, shares: Shares, waiting: Callable[[], int]) -> None:
        """Stores the slots that workers share, and a function that counts rows that wait. Called before the engine."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A model whose rows grow over many steps: it brings an engine. A job has one row."""

    def start_engine(self) -> Engine:
        """Returns the engine that runs this model's rows. Called once, in the main thread."""
        ...

    def begin(self, row: Prepared, job_id: str, records: Sequence[Record]) -> None:
        """Makes `row`, of the job `job_id`, go on behind `records`, the output of earlier runs; empty if there is none.

        Called once for each prepared row, before the engine gets it. Raises anything if it cannot.
        """
        ...


@runtime_checkable
class Closes(Protocol):
    """A model that holds resources other than memory."""

    def close(self) -> None:
        """Releases the resources. Called once, after the last job is settled. Raises nothing."""
        ...
