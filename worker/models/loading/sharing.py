"""Decides which rows may share a forward: those that get by it what each gets alone.

Padding is harmless to most models, on one side at least: a BERT counts its positions from the first token, so padding
before a text moves them. A few models let padding into the result on either side, and dynamically quantised ones let
every other row in. So a worker measures as it starts: rows alone against the same rows beside each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch

from millstream.broker.contract.errors import described
from millstream.worker.models.base import Prepared

log = logging.getLogger(__name__)

Side = Literal["right", "left"]
"""The side at which padding stands."""

Features = Mapping[str, Sequence[int]]
"""A text as a tokenizer makes it: a number for each token, by the name of the model's input; "input_ids" is one."""

Kind = Literal["padded", "length", "single"]
"""Rows that may share a forward: of any lengths, padded; of one length; none."""

R = TypeVar("R", bound=Prepared)
Forward = Callable[[Sequence[R], Side], torch.Tensor]
"""One forward over rows that are padded at that side: their results, [rows, ...]."""

_PHRASE = "a mill turns in the stream and grinds 12 sacks of corn "
PROBES = (
    *(_PHRASE[at:] + _PHRASE[:at].rstrip() for at in (0, 2, 7, 13)),
    "mill",
    _PHRASE * 3,
    _PHRASE * 8,
)
"""Texts to measure with: short and long ones, and some of one length."""

QUERY = "who grinds?"
"""To measure with, where a text has a query."""

_NOISE = 8
"""Padding may differ by so many times what rows of one length, which pad nothing, differ by."""


class Precision(NamedTuple):
    """Relative differences between results that the arithmetic alone explains. The larger one is the less precise."""

    close: float
    """Padding that changes results by less is harmless, whatever the noise."""
    noisy: float
    """Noise above it is more than other kernels make: rows change each other's results, as in dynamic quantisation."""

    @classmethod
    def of(cls, model: torch.nn.Module, device_type: str, backend: str) -> Precision:
        """The precision of a model's least precise weights, on the device and backend that run it."""
        # Exported models, and float32 on GPUs, may compute with fewer digits than their results have.
        plain = FLOAT32 if (device_type, backend) == ("cpu", "torch") else REDUCED
        return max([plain, *(_precision(each.dtype) for each in model.parameters())])


FLOAT32, REDUCED, HALF = Precision(1e-5, 1e-4), Precision(1e-3, 5e-3), Precision(0.1, 0.25)
"""The precision of float32; of float32 results that TF32 or float16 may be behind; of half precision."""


def _precision(dtype: torch.dtype) -> Precision:
    return HALF if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize else FLOAT32


@dataclass(frozen=True, slots=True)
class Sharing:
    """The way in which rows of one model share forwards. Rows of more than `upto` tokens do by their length at most."""

    kind: Kind = "padded"
    side: Side = "right"
    upto: float = float("inf")

    def in_groups(self, rows: Sequence[R], run: Callable[[Sequence[R]], torch.Tensor]) -> torch.Tensor:
        """The results of `run` for rows that may share a forward, [rows, ...] in the order of `rows`."""
        return in_groups(self._groups(rows), lambda places: run([rows[at] for at in places]))

    def of_one_forward(self, rows: Sequence[R]) -> Sequence[R]:
        """The rows, but none if they take more than one forward."""
        return rows if len(self._groups(rows)) == 1 else ()

    def _groups(self, rows: Sequence[R]) -> list[list[int]]:
        return grouped(self.key(at, row.tokens) for at, row in enumerate(rows))

    def key(self, at: int, length: int) -> Hashable:
        """Equal for rows that may share a forward: of the row at place `at`, which has `length` tokens."""
        if self.kind == "single":
            return "row", at
        return "any" if self.kind == "padded" and length <= self.upto else length


def grouped(keys: Iterable[Hashable]) -> list[list[int]]:
    """The places of equal keys, in the order in which each came first."""
    places: dict[Hashable, list[int]] = {}
    for at, key in enumerate(keys):
        places.setdefault(key, []).append(at)
    return list(places.values())


def in_groups(groups: Sequence[Sequence[int]], run: Callable[[Sequence[int]], torch.Tensor]) -> torch.Tensor:
    """The results of `run` for each group of places, [rows, ...] in the order of the rows."""
    if len(groups) == 1:
        return run(groups[0])
    found = torch.cat([run(group) for group in groups])
    return found[torch.tensor([at for group in groups for at in group]).argsort()]


class Filling(NamedTuple):
    """The values that padding is made of, by the name of the model's input; of others it is 0."""

    ids: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Filling:
        """A tokenizer without a padding token pads with id 0: the mask hides it."""
        return cls({"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id or 0})

    def padded(self, rows: Sequence[Features], side: Side) -> dict[str, torch.Tensor]:
        """The rows and their attention mask, int64 [rows, longest]."""
        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)

        def tensor(values: Iterable[Sequence[int]], fill: int) -> torch.Tensor:
            blanks = ([fill] * (width - length) for length in lengths)
            pairs = zip(values, blanks, strict=True)
            made = [[*blank, *row] if side == "left" else [*row, *blank] for row, blank in pairs]
            return torch.tensor(made, dtype=torch.long)

        tensors = {name: tensor([row[name] for row in rows], self.ids.get(name, 0)) for name in rows[0]}
        return {**tensors, "attention_mask": tensor([[1] * length for length in lengths], 0)}


def measured(
    forward: Forward[R],
    rows: Sequence[R],
    sides: Sequence[Side],
    upto: float = float("inf"),
    precision: Precision = FLOAT32,
) -> Sharing:
    """The sharing of `forward`, by what `rows` get alone and together; padding is tried at `sides` in turn.

    Rows of more than `upto` tokens are not tried: padding is known to change those. Rows that fail alone are no
    evidence; the warm-up says why they do. `precision` is the model's; that of the results counts if it is less.
    """
    with torch.inference_mode():
        trial = _Trial(forward, [row for row in rows if row.tokens <= upto], sides[0], precision)
        for side in sides:
            if trial.padding(side) <= trial.precision.close:
                return Sharing("padded", side, upto)
        noise = trial.noise()
        if noise > trial.precision.noisy:
            log.warning("rows that share a forward change each other's results, by %.1e: each runs alone", noise)
            return Sharing("single", sides[0])
        for side in sides:
            if trial.padding(side) <= min(_NOISE * noise, HALF.noisy):
                return Sharing("padded", side, upto)
        log.warning(
            "padding changes results of this model, by %.1e: only rows of one length share a forward",
            trial.padding(sides[0]),
        )
        return Sharing("length", sides[0])


class _Trial(Generic[R]):
    """Forwards whose results are compared."""

    def __init__(self, forward: Forward[R], rows: Sequence[R], side: Side, precision: Precision) -> None:
        self._forward = forward
        self._side = side
        self._padding: dict[Side, float] = {}
        self.precision = precision
        found = ((row, self._results([row], side)) for row in rows)
        self._alone = [(row, results) for row, results in found if results is not None]

    def padding(self, side: Side) -> float:
        """The relative difference that running rows of different lengths together makes."""
        if side not in self._padding:
            of_each_length = {row.tokens: (row, results) for row, results in self._alone}
            self._padding[side] = self._difference(list(of_each_length.values()), side)
        return self._padding[side]

    def noise(self) -> float:
        """The relative difference that rows of one length make to each other; infinity if no two rows have the same."""
        places = max(grouped(row.tokens for row, _ in self._alone), key=len, default=[])
        return self._difference([self._alone[at] for at in places], self._side) if len(places) > 1 else float("inf")

    def _difference(self, alone: Sequence[tuple[R, torch.Tensor]], side: Side) -> float:
        """The largest difference to a row alone, of the largest result; infinity if the rows fail together."""
        if len(alone) < 2:
            return 0.0
        expected = torch.cat([results for _, results in alone])
        found = self._results([row for row, _ in alone], side)
        if found is None:
            return float("inf")
        return float((found - expected).norm(dim=1).max() / expected.norm(dim=1).max().clamp(min=1e-9))

    def _results(self, rows: Sequence[R], side: Side) -> torch.Tensor | None:
        """float32 [rows, ...]; None if the rows fail."""
        try:
            results = self._forward(rows, side)
        except Exception as error:  # noqa: BLE001 - whatever it is, others may run
            log.debug("%d rows fail together: %s", len(rows), described(error))
            return None
        self.precision = max(self.precision, _precision(results.dtype))
        return torch.nan_to_num(results.float().reshape(len(results), -1)).cpu()
