"""Check that no custom_id of a batch file of OpenAI's API is repeated: answers are told apart by it alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from millstream.broker.contract.errors import InvalidRequest

Ids = Callable[[], Iterator[tuple[int, str]]]
"""Reads a file's custom_ids anew, each with the number of its line, from 1."""


def check_unique(ids: Ids) -> None:
    """Raises InvalidRequest if an id is repeated, with the first line that repeats one, and the line before it.

    Holds 32 bytes for each id, not the ids.
    """
    hashes = np.fromiter((hash(custom_id) for _, custom_id in ids()), np.int64)
    order = hashes.argsort(kind="stable")
    alike = hashes[order[1:]] == hashes[order[:-1]]
    earlier, later = order[:-1][alike], order[1:][alike]
    for at in later.argsort():
        (line, custom_id), (again, other) = _read_two(ids, int(earlier[at]), int(later[at]))
        # Different ids may have one hash.
        if custom_id == other:
            raise InvalidRequest(
                f"custom_id {custom_id[:80]!r} of line {again} is that of line {line}, too",
                hint="give each request its own: answers are told apart by it",
            )


def _read_two(ids: Ids, first: int, second: int) -> tuple[tuple[int, str], tuple[int, str]]:
    """Returns the ids at two positions, which count from 0, with their lines."""
    found = islice(ids(), first, second + 1)
    return next(found), deque(found, 1)[0]
