"""Decides which rows may share a forward: rows whose results are the same together and alone.

In most models padding changes no result, at least on one side: BERT counts its positions from the first token, so only
padding before a text moves them. In a few models padding changes results on either side, and in dynamically quantised
models every other row does. So a worker measures at its start: it runs rows alone and together, and compares.
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
"""The side of a row at which padding is added."""

Features = Mapping[str, Sequence[int]]
"""Output of a tokenizer for one text: a number for each token, by the name of the model's input ("input_ids", ...)."""

Kind = Literal["padded", "length", "single"]
"""Rows that may share a forward: rows of any lengths, padded; rows of one length; no rows."""

R = TypeVar("R", bound=Prepared)
Forward = Callable[[Sequence[R], Side], torch.Tensor]
"""Runs one forward over rows that are padded at that side. Returns their results, [rows, ...]."""

_PHRASE = "a mill turns in the stream and grinds 12 sacks of corn "
PROBES = (
    *(_PHRASE[at:] + _PHRASE[:at].rstrip() for at in (0, 2, 7, 13)),
    "mill",
    _PHRASE * 3,
    _PHRASE * 8,
)
"""Texts for the measurement: short and long ones, and several of one length."""

QUERY = "who grinds?"
"""Query for the measurement of a reranker."""

_NOISE = 8
"""Factor: padding may make differences of _NOISE times those that rows of one length make, which need no padding."""


class Precision(NamedTuple):
    """Relative differences that rounding alone explains. A larger tuple is less precise."""

    close: float
    """Padding that makes at most this difference is accepted, for any noise."""
    noisy: float
    """More noise than this is not rounding: rows change each other's results, as in dynamic quantisation."""

    @classmethod
    def of(cls, model: torch.nn.Module, device_type: str, backend: str) -> Precision:
        """Returns the precision of a model's least precise weights, on the device and backend that run it."""
        # Exported models, and float32 on GPUs (TF32), may compute with fewer digits than their results have.
        plain = FLOAT32 if (device_type, backend) == ("cpu", "torch") else REDUCED
        return max([plain, *(_precision(each.dtype) for each in model.parameters())])


FLOAT32, REDUCED, HALF = Precision(1e-5, 1e-4), Precision(1e-3, 5e-3), Precision(0.1, 0.25)
"""The precision of float32; of float32 results that may be computed in TF32 or float16; of half precision."""


def _precision(dtype: torch.dtype) -> Precision:
    return HALF if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize else FLOAT32


@dataclass(frozen=True, slots=True)
class Sharing:
    """Rule by which rows of one model share forwards. Above `max_tokens` tokens only rows of one length do."""

    kind: Kind = "padded"
    side: Side = "right"
    max_tokens: float = float("inf")

    def run_in_groups(self, rows: Sequence[R], run: Callable[[Sequence[R]], torch.Tensor]) -> torch.Tensor:
        """Calls `run` for each group of rows that may share a forward. Returns [rows, ...] in the order of `rows`."""
        return run_in_groups(self._groups(rows), lambda places: run([rows[at] for at in places]))

    def of_one_forward(self, rows: Sequence[R]) -> Sequence[R]:
        """Returns the rows if one forward runs them all, else none."""
        return rows if len(self._groups(rows)) == 1 else ()

    def _groups(self, rows: Sequence[R]) -> list[list[int]]:
        return group_places(self.key(at, row.tokens) for at, row in enumerate(rows))

    def key(self, at: int, length: int) -> Hashable:
        """Returns the key of the row at place `at` with `length` tokens. Rows of equal keys may share a forward."""
        if self.kind == "single":
            return "row", at
        return "any" if self.kind == "padded" and length <= self.max_tokens else length


def group_places(keys: Iterable[Hashable]) -> list[list[int]]:
    """Returns the places of equal keys, as one list for each key, in the order of their first places."""
    places: dict[Hashable, list[int]] = {}
    for at, key in enumerate(keys):
        places.setdefault(key, []).append(at)
    return list(places.values())


def run_in_groups(groups: Sequence[Sequence[int]], run: Callable[[Sequence[int]], torch.Tensor]) -> torch.Tensor:
    """Calls `run` for each group of places. Returns [rows, ...] in the order of the rows."""
    if len(groups) == 1:
        return run(groups[0])
    found = torch.cat([run(group) for group in groups])
    return found[torch.tensor([at for group in groups for at in group]).argsort()]


class Padding(NamedTuple):
    """The padding value of each input of the model, by its name; 0 for inputs that are not in it."""

    ids: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Padding:
        """Returns the padding of a tokenizer; id 0 if it has no padding token, since the mask hides it."""
        return cls({"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id or 0})

    def pad(self, rows: Sequence[Features], side: Side) -> dict[str, torch.Tensor]:
        """Pads rows at `side`. Returns their inputs and attention mask, int64 [rows, longest]."""
        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)

        def tensor(values: Iterable[Sequence[int]], fill: int) -> torch.Tensor:
            blanks = ([fill] * (width - length) for length in lengths)
            pairs = zip(values, blanks, strict=True)
            made = [[*blank, *row] if side == "left" else [*row, *blank] for row, blank in pairs]
            return torch.tensor(made, dtype=torch.long)

        tensors = {name: tensor([row[name] for row in rows], self.ids.get(name, 0)) for name in rows[0]}
        return {**tensors, "attention_mask": tensor([[1] * length for length in lengths], 0)}


def measure(
    forward: Forward[R],
    rows: Sequence[R],
    sides: Sequence[Side],
    max_tokens: float = float("inf"),
    precision: Precision = FLOAT32,
) -> Sharing:
    """Compares the results of `rows` alone and together. Padding is tried at `sides`, in order. Returns the sharing.

    Rows of more than `max_tokens` tokens are not tried: padding is known to change them. Rows that fail alone are
    ignored; the warm-up reports why they fail. `precision` is the model's; if the results are less precise, theirs
    counts.
    """
    with torch.inference_mode():
        trial = _Trial(forward, [row for row in rows if row.tokens <= max_tokens], sides[0], precision)
        for side in sides:
            if trial.padding(side) <= trial.precision.close:
                return Sharing("padded", side, max_tokens)
        noise = trial.noise()
        if noise > trial.precision.noisy:
            log.warning("rows that share a forward change each other's results, by %.1e: each row runs alone", noise)
            return Sharing("single", sides[0])
        for side in sides:
            if trial.padding(side) <= min(_NOISE * noise, HALF.noisy):
                return Sharing("padded", side, max_tokens)
        log.warning(
            "padding changes results of this model, by %.1e: only rows of one length share a forward",
            trial.padding(sides[0]),
        )
        return Sharing("length", sides[0])


class _Trial(Generic[R]):
    """Runs rows alone and together, and compares the results."""

    def __init__(self, forward: Forward[R], rows: Sequence[R], side: Side, precision: Precision) -> None:
        self._forward = forward
        self._side = side
        self._padding: dict[Side, float] = {}
        self.precision = precision
        found = ((row, self._results([row], side)) for row in rows)
        self._alone = [(row, results) for row, results in found if results is not None]

    def padding(self, side: Side) -> float:
        """Returns the relative difference of rows of different lengths, together and alone."""
        if side not in self._padding:
            of_each_length = {row.tokens: (row, results) for row, results in self._alone}
            self._padding[side] = self._difference(list(of_each_length.values()), side)
        return self._padding[side]

    def noise(self) -> float:
        """Returns the relative difference of rows of one length, together and alone; infinity if all lengths differ."""
        places = max(group_places(row.tokens for row, _ in self._alone), key=len, default=[])
        return self._difference([self._alone[at] for at in places], self._side) if len(places) > 1 else float("inf")

    def _difference(self, alone: Sequence[tuple[R, torch.Tensor]], side: Side) -> float:
        """Returns the largest difference of a row together and alone, relative to the largest result.

        Infinity if the rows fail together.
        """
        if len(alone) < 2:
            return 0.0
        expected = torch.cat([results for _, results in alone])
        found = self._results([row for row, _ in alone], side)
        if found is None:
            return float("inf")
        return float((found - expected).norm(dim=1).max() / expected.norm(dim=1).max().clamp(min=1e-9))

    def _results(self, rows: Sequence[R], side: Side) -> torch.Tensor | None:
        """Returns float32 [rows, values]; None if the rows fail."""
        try:
            results = self._forward(rows, side)
        except Exception as error:  # noqa: BLE001 - after any failure other rows may still run
            log.debug("%d rows fail together: %s", len(rows), described(error))
            return None
        self.precision = max(self.precision, _precision(results.dtype))
        return torch.nan_to_num(results.float().reshape(len(results), -1)).cpu()
