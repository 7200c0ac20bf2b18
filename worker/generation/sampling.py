"""Chooses the next token of each text from the model's logits.

A row's token depends on its own logits, options and random number alone: sums over the vocabulary are taken over whole
numbers, which have the same result in any order, so neither the other rows nor the device's way to add changes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Series
from typing import TYPE_CHECKING

import numpy as np
import torch

from millstream.broker.contract.errors import MillstreamError, ModelFailed
from millstream.worker.generation.philox import uniforms
from millstream.worker.generation.record import Token
from millstream.worker.models.base import NOT_FINITE

if TYPE_CHECKING:
    from millstream.worker.generation.sequence import Sequence
    from millstream.worker.generation.settings import Sampling

_LOG_ONE = 44 * math.log(2.0)
"""Natural logarithm of the weight of the most probable token. 2^18 tokens have at most 2^62 in all: it fits 64 bits."""

_BLOCK = 64
"""Tokens of a block, of which the highest score is taken to find the highest ones of all."""

LEAST_LOGPROB = -9999.0
"""Log probability reported for tokens that the model excludes, as in OpenAI's API: JSON has no infinity."""


def choose(logits: torch.Tensor, sequences: Series[Sequence]) -> list[Token | MillstreamError]:
    """Returns the next token of each sequence, or its error: its logits are not finite, or its grammar failed.

    `logits`: float [rows, vocabulary], one row for each sequence, in order. It is not changed. If all rows take the
    most probable token, one pass over the logits and one transfer to the CPU are all that is done.
    """
    logits = logits.detach()
    peaks, ids = _most_probable(logits)
    faults: dict[int, MillstreamError] = {}
    for part in _parts([at for at, each in enumerate(sequences) if not each.is_plain], logits.device):
        rows = torch.tensor(part, device=logits.device)
        scores = _copy(logits, part)
        for at, row in zip(part, scores, strict=True):
            if fault := _adjust(row, sequences[at]):
                faults[at] = fault
        highest, ids[rows] = _pick(scores, [sequences[at] for at in part])
        peaks[rows] = torch.where(peaks[rows].isfinite(), highest, math.nan)
    reported = _logprobs(logits, ids, sequences)
    table = torch.stack((ids.double(), peaks)).tolist()
    faults |= {at: ModelFailed(NOT_FINITE) for at, peak in enumerate(table[1]) if not math.isfinite(peak)}
    return [faults.get(at) or Token(int(token), *reported.get(at, ())) for at, token in enumerate(table[0])]


def _parts(rows: list[int], device: torch.device) -> list[list[int]]:
    """Returns the rows to compute together: on the CPU one by one, because one row fits its cache and all do not."""
    if device.type == "cpu":
        return [[at] for at in rows]
    return [rows] if rows else []


def _copy(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Returns rows as float64 [rows, vocabulary]."""
    chosen = logits[rows[0] : rows[0] + 1] if len(rows) == 1 else logits[rows]
    return chosen.to(torch.float64, copy=True)


def _most_probable(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the highest score of each row and its id, the lowest one of equals: float64 [rows], int64 [rows]."""
    if scores.device.type != "cpu":
        peaks, ids = scores.max(dim=-1)
        return peaks.double(), ids
    # numpy takes 6 us for 49,152 scores, torch 170.
    wide = scores if scores.dtype is torch.float64 else scores.float()
    ids = torch.from_numpy(wide.numpy().argmax(axis=-1))
    return wide.gather(1, ids[:, None])[:, 0].double(), ids


def _true_at(mask: torch.Tensor) -> torch.Tensor:
    """Returns the indices at which a mask [n] is true, in order: int64 [true]."""
    # numpy takes a tenth of torch's time.
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero()[:, 0]


def _pick(scores: torch.Tensor, sequences: Series[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the highest of each row's `scores` and the ids chosen: float64 [rows], int64 [rows].

    `scores`: the adjusted logits, float64 [rows, vocabulary], which are changed. A row without a finite score gets any
    id.
    """
    drawn = [at for at, each in enumerate(sequences) if each.sampling.temperature > 0]
    if len(drawn) == len(sequences):
        peaks = scores.amax(dim=-1)
        return peaks, _draw(scores.sub_(peaks[:, None]), sequences)
    peaks, ids = _most_probable(scores)
    if drawn:
        rows = torch.tensor(drawn, device=scores.device)
        ids[rows] = _draw(scores[rows] - peaks[rows, None], [sequences[at] for at in drawn])
    return peaks, ids


def _adjust(row: torch.Tensor, sequence: Sequence) -> MillstreamError | None:
    """Applies penalties, biases and the grammar to the logits of one row, in this order. Returns its fault, if any."""
    sampling = sequence.sampling
    if sampling.penalises:
        sequence.occurrences.penalise(
            row, sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        )
    if sequence.options.logit_bias:
        sequence.biases.apply(row)
    return sequence.grammar.mask(row) if sequence.grammar else None


def _draw(scores: torch.Tensor, sequences: Series[Sequence]) -> torch.Tensor:
    """Returns ids drawn at random, int64 [rows]. The random number chooses in the order of token ids.

    `scores`: adjusted logits less the highest one of their row, float64 [rows, vocabulary], which are changed.
    """
    samplings = [each.sampling for each in sequences]
    # The others would get the weight 0.
    ids = _highest(scores[0], samplings[0].top_k) if len(samplings) == 1 else None
    reach = weigh(scores if ids is None else scores[:, ids], samplings).cumsum(dim=-1)
    last = reach[:, -1:] - 1
    numbers = uniforms(np.array([each.seed for each in sequences]), np.array([each.generated for each in sequences]))
    at = (torch.from_numpy(numbers).to(scores.device)[:, None] * reach[:, -1:]).long()
    drawn = torch.searchsorted(reach, torch.minimum(at, last), right=True)[:, 0].clamp_(0, reach.shape[-1] - 1)
    return drawn if ids is None else ids[drawn]


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
    weights = scores.add_(_LOG_ONE).exp_().long()
    for row, sampling in zip(weights, samplings, strict=True):
        if sampling.top_p < 1.0:
            _limit_top_p(row, sampling.top_p)
    return weights if excluded is None else weights.masked_fill_(excluded, 0)


def _column(values: Series[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _highest(row: torch.Tensor, count: int) -> torch.Tensor | None:
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


Reported = tuple[float, tuple[tuple[int, float], ...]]
"""The log probability of a token, and the most probable tokens with theirs."""


def _logprobs(logits: torch.Tensor, ids: torch.Tensor, sequences: Series[Sequence]) -> dict[int, Reported]:
    """Returns log probabilities for the rows that ask for them, by row: those of the model's own logits."""
    wanting = {at: count for at, each in enumerate(sequences) if (count := each.options.logprobs) is not None}
    if not wanting:
        return {}
    most = min(max(wanting.values()), logits.shape[-1])
    tables = []
    for part in _parts(list(wanting), logits.device):
        rows = torch.tensor(part, device=logits.device)
        scores = _copy(logits, part)
        scores -= scores.amax(dim=-1, keepdim=True)
        own = scores.gather(1, ids[rows, None])
        among = _highest(scores[0], most) if len(part) == 1 else None
        values, top = (scores if among is None else scores[:, among]).topk(most)
        top = top if among is None else among[top]
        total = scores.add_(_LOG_ONE).exp_().long().sum(dim=-1, keepdim=True)
        values = torch.cat((own, values), dim=1) - (total.double().log() - _LOG_ONE)
        # Log probabilities become float32 values, as records have them. Ids are exact in float64.
        tables.append(torch.cat((values.clamp_(min=LEAST_LOGPROB).float().double(), top.double()), dim=1))
    lines = torch.cat(tables).tolist()
    return {at: _report(count, *line) for (at, count), line in zip(wanting.items(), lines, strict=True)}


def _report(count: int, own: float, *top: float) -> Reported:
    half = len(top) // 2
    pairs = sorted(zip(map(int, top[half:]), top[:half], strict=True), key=lambda each: (-each[1], each[0]))
    return own, tuple(pairs[:count])
