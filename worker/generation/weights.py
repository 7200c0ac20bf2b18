"""Weights of tokens: their probabilities as whole numbers, with 0 for the tokens that a text's limits exclude.

Sums of whole numbers are the same in any order of adding, so neither other rows nor the device change a choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Series

import numpy as np
import torch

from millstream.worker.generation.settings import Sampling

LOG_ONE = 44 * math.log(2.0)
"""Natural logarithm of the weight of the most probable token. 2^18 tokens have at most 2^62 in all: it fits 64 bits."""

_BLOCK = 64
"""Tokens of a block, of which the highest score is taken to find the highest ones of all."""


def weigh(scores: torch.Tensor, samplings: Series[Sampling]) -> torch.Tensor:
    """Returns the weight with which each token is drawn, int64 [rows, vocabulary]; 0 for tokens that are excluded.

    `scores`: adjusted logits less the highest one of their row, float64 [rows, vocabulary], which are changed. The
    order is that of transformers: temperature, top_k, top_p, min_p.
    """
    scores = scores.div_(_column([each.temperature for each in samplings], scores))
    _limit_top_k(scores, [each.top_k for each in samplings])
    if any(each.min_p for each in samplings):
        # Before top_p, which is to count all tokens, so it is a part of the weights only later.
        excluded = scores < _column([each.min_p for each in samplings], scores).log()
    else:
        excluded = None
    weights = scores.add_(LOG_ONE).exp_().long()
    for row, sampling in zip(weights, samplings, strict=True):
        if sampling.top_p < 1.0:
            _limit_top_p(row, sampling.top_p)
    return weights if excluded is None else weights.masked_fill_(excluded, 0)


def _column(values: Series[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def highest_of(row: torch.Tensor, count: int) -> torch.Tensor | None:
    """Returns the ids of the `count` highest values of one row, and of some lower ones, in order; None for all ids.

    The lowest of the `count` highest maxima of blocks is not above the value that is sought, and cheap to find.
    """
    blocks = len(row) // _BLOCK
    if not 0 < count <= blocks // 2:
        return None
    maxima = row[: blocks * _BLOCK].view(blocks, _BLOCK).amax(dim=1)
    # Not >=: so a row of NaN, which is refused later, keeps its tokens.
    return _true_at((row < maxima.topk(count).values[-1]).logical_not_())


def _limit_top_k(scores: torch.Tensor, limits: Series[int]) -> None:
    """Excludes all but the k highest scores of each row, and those equal to the k-th. A limit of 0 excludes none."""
    vocabulary = scores.shape[-1]
    limited = [at for at, limit in enumerate(limits) if 0 < limit < vocabulary]
    if not limited:
        return
    rows = torch.tensor(limited, device=scores.device)
    highest = scores[rows].topk(max(limits[at] for at in limited)).values
    last = torch.tensor([limits[at] - 1 for at in limited], device=scores.device)[:, None]
    scores[rows] = scores[rows].masked_fill(scores[rows] < highest.gather(1, last), -math.inf)


def _limit_top_p(weights: torch.Tensor, top_p: float) -> None:
    """Sets the weights of the least probable tokens to 0 that together have at most 1 - `top_p` of one row's weight.

    Of tokens of equal weight the one with the highest id goes first; the last one of all stays.
    """
    total = weights.sum()
    most = (1.0 - top_p) * total
    # All tokens of the average weight of `most`, and below, go: only the others need sorting.
    floor = torch.minimum((most / len(weights)).long(), weights.max() - 1)
    ids = _true_at(weights > floor).flip(0)
    if not len(ids):  # logits that are not finite have no weights
        return
    ascending, order = weights[ids].sort(stable=True)
    gone = ascending.cumsum(0) + (total - ascending.sum()) <= most
    gone[-1] = False
    weights.masked_fill_(weights <= floor, 0)
    weights[ids[order[gone]]] = 0


def _true_at(mask: torch.Tensor) -> torch.Tensor:
    """Returns the indices at which a mask [n] is true, in order: int64 [true]."""
    # numpy takes a tenth of torch's time.
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero()[:, 0]
