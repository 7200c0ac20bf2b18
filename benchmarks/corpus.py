"""What is sent: payloads of one size for the queue, a long-tailed mix of texts for the model. The same each time."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

SEED = 7
MEDIAN_WORDS, SPREAD, MOST_WORDS = 40, 0.7, 240
"""Lengths are log-normal; the longest stay within MiniLM's 256 tokens."""

_WORDS = textwrap.dedent("""
    the river runs past a mill and turns its wheel all day while people bring corn from the fields to grind into flour
    each sack waits in line until the stone is free again then a small boy carries it up to the loft where rain cannot
    reach water is higher in spring than in late summer so more work can be done before night falls on the valley town
    machines have changed how we store keep move and measure things but not why we need bread on our table every morning
""").split()


def payloads(count: int, length: int) -> list[str]:
    """Distinct texts of `length` characters (ASCII, so bytes)."""
    chance = random.Random(SEED)
    filler = " ".join(chance.choices(_WORDS, k=length))
    return [f"{number:06d} {filler[number % 50 :]}"[:length].ljust(length, "x") for number in range(count)]


def mix(count: int) -> list[str]:
    """Texts of about 40 words in the middle and up to 240 in the tail."""
    chance = random.Random(SEED)
    lengths = [min(MOST_WORDS, max(1, round(MEDIAN_WORDS * chance.lognormvariate(0, SPREAD)))) for _ in range(count)]
    return [" ".join(chance.choices(_WORDS, k=length)) for length in lengths]


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in their order, `size` at a time."""
    return (items[first : first + size] for first in range(0, len(items), size))
