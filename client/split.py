"""Splitting of a call's rows into jobs. Pure. Rows of similar length share a job, so that a worker pads little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

SPECIAL_TOKENS = 2
"""Tokens that a model adds to a text, as an estimate."""

BYTES_PER_TOKEN = 4
"""UTF-8 bytes of a token, as an estimate."""

MAX_PART_BYTES = 512 * 1024
"""Bytes that a part may have at most, if each row is as long as its longest; a single row may have more."""


class Part(NamedTuple):
    """Rows of a call that one job carries, and about how many tokens they have.

    `twins` maps a row to the rows with an equal text. These are not sent, and get the outcome of that row.
    """

    rows: tuple[int, ...]
    tokens: int
    twins: Mapping[int, Sequence[int]] = MappingProxyType({})

    @property
    def size(self) -> int:
        """Number of rows that get their outcome from this part, twins included."""
        return len(self.rows) + sum(map(len, self.twins.values()))


def estimate_tokens(size: int) -> int:
    """Estimates the tokens of a text of `size` UTF-8 bytes. A client has no tokenizer; the worker counts exactly."""
    return SPECIAL_TOKENS + size // BYTES_PER_TOKEN


def split(sizes: Mapping[int, int], most_rows: int, most_tokens: int) -> list[Part]:
    """Splits the rows of `sizes` (row -> UTF-8 bytes) into parts. Each row is in one part.

    A part has at most `most_rows` rows and about `most_tokens` padded tokens, but at least one row. Parts with long
    rows come first: the last parts are then short, and the workers finish together. Within a part rows keep their
    order.
    """
    if len(sizes) == 1:
        ((row, size),) = sizes.items()
        return [Part((row,), estimate_tokens(size))]
    order = sorted(sizes, key=lambda row: -sizes[row])
    parts: list[Part] = []
    start = 0
    while start < len(order):
        longest = sizes[order[start]]
        fitting = min(most_rows, most_tokens // estimate_tokens(longest), MAX_PART_BYTES // max(1, longest))
        rows = tuple(sorted(order[start : start + max(1, fitting)]))
        parts.append(Part(rows, sum(estimate_tokens(sizes[row]) for row in rows)))
        start += len(rows)
    return parts


def split_evenly(sizes: Mapping[int, int], most_rows: int, row_tokens: int) -> list[Part]:
    """Splits as `split` does, for rows that count `row_tokens` each, whatever their size."""
    parts = split(sizes, most_rows, most_rows * estimate_tokens(max(sizes.values(), default=0)))
    return [part._replace(tokens=row_tokens * len(part.rows)) for part in parts]


def split_once(sizes: Mapping[int, int], inputs: Sequence[object], most_rows: int, most_tokens: int) -> list[Part]:
    """Splits as `split` does, but sends rows with equal inputs once: the others become twins."""
    rows_of: dict[object, list[int]] = {}
    for row in sizes:
        rows_of.setdefault(inputs[row], []).append(row)
    twins = {first: others for first, *others in rows_of.values() if others}
    parts = split({rows[0]: sizes[rows[0]] for rows in rows_of.values()}, most_rows, most_tokens)
    return [part._replace(twins={row: twins[row] for row in part.rows if row in twins}) for part in parts]
