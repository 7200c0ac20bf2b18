"""How rows of different lengths share one forward: pure arithmetic on their lengths, no tensors.

Padded, each row is a sequence as long as the longest one. Packed, rows lie one after another in fewer sequences, and
each sees only itself (Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import NamedTuple

SEQUENCE_TOKENS = 256
"""About how long packed sequences are; longer rows are not packed. Attention costs more in longer sequences, and
shorter ones leave more of themselves empty."""

PACKED_COST = 1.06
"""A token of a packed sequence costs so many of a padded one: attention compares it with all others of its sequence."""


class Layout(NamedTuple):
    """The rows of each sequence, by their place among those given, and how many tokens each sequence has."""

    sequences: Sequence[Sequence[int]]
    width: int
    is_packed: bool = False

    @property
    def tokens(self) -> int:
        """What a forward computes."""
        return len(self.sequences) * self.width

    @property
    def cost(self) -> float:
        """What that costs, in tokens of a padded batch."""
        return self.tokens * (PACKED_COST if self.is_packed else 1.0)


def layout(lengths: Sequence[int], packs: bool) -> Layout:
    """The cheaper way for rows of these lengths in tokens, in a model that `packs` or does not."""
    longest = max(lengths, default=0)
    padded = Layout([[at] for at in range(len(lengths))], longest)
    if not packs or longest > SEQUENCE_TOKENS or sum(lengths) * PACKED_COST >= padded.tokens:
        return padded
    packed = _packed(lengths, SEQUENCE_TOKENS)
    return packed if packed.cost < padded.cost else padded


def computed(lengths: Sequence[int], packs: bool) -> int:
    """Tokens that one forward over rows of these lengths computes."""
    return layout(lengths, packs).tokens if packs else max(lengths, default=0) * len(lengths)


def _packed(lengths: Sequence[int], width: int) -> Layout:
    """As few sequences of about `width` as hold all rows, filled alike.

    The longest row first, into the emptiest sequence (LPT: Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    count = -(-sum(lengths) // width)
    sequences: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, at) for at in range(count)]
    heapify(filled)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        tokens, at = filled[0]
        sequences[at].append(row)
        heapreplace(filled, (tokens + lengths[row], at))
    return Layout(sequences, max(filled)[0], is_packed=True)
