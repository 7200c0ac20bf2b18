"""What the worker asks of a model. Three methods; everything else (queue, batches, deadlines, faults) is above it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

from millstream.broker.config.load import Runtime
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Encoded, Json, Vectors

Result = Encoded | Json | MillstreamError
"""What becomes of one row in a forward: a vector [dim], a JSON value, or its error."""

NOT_FINITE = "the model answered NaN or infinity"

NO_OPTIONS: Mapping[str, Json] = MappingProxyType({})


ANY_LENGTH = 10**9
"""Tokens. A limit as high as that is none: some tokenizers name 10^30."""


class Limit(NamedTuple):
    """The most tokens of a text, special ones included. `ran`: the longest text that ran at start; 0 if none did."""

    tokens: int
    ran: int

    def __str__(self) -> str:
        if self.tokens >= ANY_LENGTH:
            return "texts of any length"
        most = f"{self.tokens} tokens a text"
        return most if self.ran >= self.tokens else f"{most}, {self.ran} were tried"


@dataclass(slots=True, eq=False)
class Prepared:
    """One row ready to run: its length in tokens, special ones included, and what the model made of it."""

    tokens: int
    features: object
    truncated: bool = False


Upcoming = Callable[[], Sequence[Prepared]]
"""The rows that probably run next; none where nothing waits."""


class Model(Protocol):
    """Weights on a device. `prepare` runs in the claimer thread while `forward` runs in the main one."""

    op: str
    """The operation its jobs name, for instance "embed"."""

    fingerprint: str
    """Names the weights and how they run; vectors of different fingerprints must not be mixed."""

    sample_options: Mapping[str, Json]
    """The options that go with `samples`."""

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        """Each input as a row, or the error that row alone gets: not a string, too long."""
        ...

    def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json] | list[Result]:
        """One result a row, in order: float32 [rows, dim], or a list where rows differ. May raise anything."""
        ...

    def samples(self, tokens: int) -> Sequence[Json]:
        """One input of about `tokens` tokens, for the warm-up to measure with; none where only callers know any."""
        ...


@runtime_checkable
class Adapts(Protocol):
    """A model whose rows depend on its service's limits."""

    def adapt(self, runtime: Runtime) -> None:
        """Take over limits that were pushed, for the rows prepared from now on. Called from any thread."""
        ...


@runtime_checkable
class Foresees(Protocol):
    """A model that can prepare its next forward while one runs."""

    def foresee(self, upcoming: Upcoming) -> None:
        """Ask `upcoming`, in the main thread, for the rows that come next. Called once, before the first forward."""
        ...


@runtime_checkable
class Laps(Protocol):
    """A model that prepares its rows one by one, each of which may take long."""

    def lap_by(self, lap: Callable[[], None]) -> None:
        """Call `lap` before each row of `prepare`, in order: it has the whole stall timeout, and a death is its own.

        Called once, before any.
        """
        ...


@runtime_checkable
class Reads(Protocol):
    """A model that reads texts up to a limit."""

    limit: Limit


@runtime_checkable
class Placed(Protocol):
    """A model that says where its forwards run: the kind of device, such as "cpu", and the library, such as "torch"."""

    device_type: str
    backend: str


def packs(model: Model) -> bool:
    """Whether `model` has a true attribute `packs`: it runs rows of any lengths with no padding."""
    return bool(getattr(model, "packs", False))


@runtime_checkable
class Closes(Protocol):
    """A model that holds more than memory."""

    def close(self) -> None:
        """Called once, when the last answer is settled. Raises nothing."""
        ...
