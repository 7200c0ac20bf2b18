"""Lists to jobs and back: pure. Rows of like length share a job, so that a worker pads little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

SPECIAL_TOKENS = 2
BYTES_PER_TOKEN = 4
MAX_PART_BYTES = 512 * 1024


class Part(NamedTuple):
    """One job's share of a call: which rows it carries, and about how many tokens they have.

    `twins` are rows that do not travel: each has the text of one that does, and gets its outcome.
    """

    rows: tuple[int, ...]
    tokens: int
    twins: Mapping[int, Sequence[int]] = MappingProxyType({})

    @property
    def size(self) -> int:
        """Rows that have their outcome once this part has."""
        return len(self.rows) + sum(map(len, self.twins.values()))


def estimate_tokens(size: int) -> int:
    """Tokens of a text of `size` UTF-8 bytes, roughly: a client has no tokenizer, and the worker counts again."""
    return SPECIAL_TOKENS + size // BYTES_PER_TOKEN


def split(sizes: Mapping[int, int], most_rows: int, most_tokens: int) -> list[Part]:
    """Parts that hold each row of `sizes` (row -> UTF-8 bytes) once.

    A part has at most `most_rows` rows and about `most_tokens` padded tokens, but at least one row. Long rows come
    first: what is left for the end is short, and workers finish together. Within a part rows keep their order.
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
    """The same for rows that count `row_tokens` each, whatever their size."""
    parts = split(sizes, most_rows, most_rows * estimate_tokens(max(sizes.values(), default=0)))
    return [part._replace(tokens=row_tokens * len(part.rows)) for part in parts]


def split_once(sizes: Mapping[int, int], inputs: Sequence[object], most_rows: int, most_tokens: int) -> list[Part]:
    """The same, where rows with equal inputs travel once."""
    rows_of: dict[object, list[int]] = {}
    for row in sizes:
        rows_of.setdefault(inputs[row], []).append(row)
    twins = {first: others for first, *others in rows_of.values() if others}
    parts = split({rows[0]: sizes[rows[0]] for rows in rows_of.values()}, most_rows, most_tokens)
    return [part._replace(twins={row: twins[row] for row in part.rows if row in twins}) for part in parts]
