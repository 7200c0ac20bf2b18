"""The tokens that a text has so far, and how they change the logits of its next token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray


class Occurrences:
    """The distinct tokens of a text, prompt included, and how often each was generated."""

    def __init__(self, prompt: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(prompt))
        self._place = {token: at for at, token in enumerate(distinct)}
        self._ids: NDArray[np.int64] = np.array(distinct, dtype=np.int64)
        self._counts: NDArray[np.int64] = np.zeros(len(distinct), dtype=np.int64)

    def add(self, token: int) -> None:
        """Counts a generated token."""
        at = self._place.setdefault(token, len(self._place))
        if at >= len(self._ids):
            more = max(64, at)
            self._ids = np.concatenate((self._ids, np.zeros(more, dtype=np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(more, dtype=np.int64)))
        self._ids[at] = token
        self._counts[at] += 1

    def penalise(self, scores: torch.Tensor, repetition: float, presence: float, frequency: float) -> None:
        """Changes `scores`, the logits of one row, float [vocabulary], in place.

        `repetition` divides the positive and multiplies the negative logits of all tokens in the text, as in
        transformers. `presence` is subtracted from those of generated tokens, `frequency` once for each time that
        the token was generated, as in OpenAI's API.
        """
        size = len(self._place)
        ids = torch.from_numpy(self._ids[:size]).to(scores.device)
        counts = torch.from_numpy(self._counts[:size]).to(scores.device)
        values = scores[ids]
        if repetition != 1.0:
            values = torch.where(values < 0, values * repetition, values / repetition)
        scores[ids] = values - presence * (counts > 0) - frequency * counts


class Biases:
    """Numbers to add to the logits of some tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._ids = torch.tensor(list(biases), dtype=torch.int64)
        self._values = torch.tensor(list(biases.values()), dtype=torch.float64)

    def apply(self, scores: torch.Tensor) -> None:
        """Changes `scores`, the logits of one row, float [vocabulary], in place."""
        scores[self._ids.to(scores.device)] += self._values.to(scores)
