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

_ONE = 2.0**44
"""Weight of the most probable token. A vocabulary of 2^18 tokens has at most 2^62 in all, which fits 64 bits."""

LEAST_LOGPROB = -9999.0
"""Log probability reported for tokens that the model excludes, as in OpenAI's API: JSON has no infinity."""


def choose(logits: torch.Tensor, sequences: Series[Sequence]) -> list[Token | MillstreamError]:
    """Returns the next token of each sequence, or its error: its logits are not finite, or its grammar failed.

    `logits`: float [rows, vocabulary], one row for each sequence, in order. It is not changed. If all rows take the
    most probable token, one pass over the logits and one transfer to the CPU are all that is done.
    """
    peaks, ids = logits.max(dim=-1)
    peaks = peaks.double()
    faults: dict[int, MillstreamError] = {}
    if processed := [at for at, each in enumerate(sequences) if not each.is_plain]:
        rows = torch.tensor(processed, device=logits.device)
        scores = logits[rows].double()
        for at, row in zip(processed, scores, strict=True):
            if fault := _adjust(row, sequences[at]):
                faults[at] = fault
        highest, ids[rows] = _pick(scores, [sequences[at] for at in processed])
        peaks[rows] = torch.where(peaks[rows].isfinite(), highest, math.nan)
    reported = _logprobs(logits, ids, sequences)
    table = torch.stack((ids.double(), peaks)).tolist()
    faults |= {at: ModelFailed(NOT_FINITE) for at, peak in enumerate(table[1]) if not math.isfinite(peak)}
    return [faults.get(at) or Token(int(token), *reported.get(at, ())) for at, token in enumerate(table[0])]


def _pick(scores: torch.Tensor, sequences: Series[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the highest of each row's `scores` and the ids chosen: float64 [rows], int64 [rows].

    `scores`: the adjusted logits, float64 [rows, vocabulary]. A row without a finite score gets any id.
    """
    peaks, ids = scores.max(dim=-1)
    drawn = [at for at, each in enumerate(sequences) if each.sampling.temperature > 0]
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

    `scores`: adjusted logits less the highest one of their row, float64 [rows, vocabulary].
    """
    reach = weigh(scores, [each.sampling for each in sequences]).cumsum(dim=-1)
    last = reach[:, -1:] - 1
    numbers = uniforms(np.array([each.seed for each in sequences]), np.array([each.generated for each in sequences]))
    at = (torch.from_numpy(numbers).to(scores.device)[:, None] * reach[:, -1:]).long()
    return torch.searchsorted(reach, torch.minimum(at, last), right=True)[:, 0].clamp_(0, scores.shape[-1] - 1)


def weigh(scores: torch.Tensor, samplings: Series[Sampling]) -> torch.Tensor:
    """Returns the weight with which each token is drawn, int64 [rows, vocabulary]; 0 for tokens that are excluded.

    `scores`: adjusted logits less the highest one of their row, float64 [rows, vocabulary]. The order is that of
    transformers: temperature, top_k, top_p, min_p.
    """
    device = scores.device
    temperatures = torch.tensor([each.temperature for each in samplings], dtype=torch.float64, device=device)
    scores = scores / temperatures[:, None]
    _limit_top_k(scores, [each.top_k for each in samplings])
    shares = scores.exp_()
    weights = (shares * _ONE).round_().long()
    for row, sampling in zip(weights, samplings, strict=True):
        if sampling.top_p < 1.0:
            _limit_top_p(row, sampling.top_p)
    least = torch.tensor([each.min_p for each in samplings], dtype=torch.float64, device=device)
    return weights.masked_fill_(shares < least[:, None], 0)


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
    ids = (weights > floor).nonzero()[:, 0].flip(0)
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
    rows = torch.tensor(list(wanting), device=logits.device)
    scores = logits[rows].double()
    scores -= scores.max(dim=-1, keepdim=True).values
    total = (scores.exp() * _ONE).round_().long().sum(dim=-1, keepdim=True)
    scores -= total.double().log() - math.log(_ONE)
    scores = scores.clamp_(min=LEAST_LOGPROB)
    own = scores.gather(1, ids[rows, None])
    top = scores.topk(min(max(wanting.values()), scores.shape[-1]))
    # One transfer: ids are exact in float64. The log probabilities become float32 values, as records have them.
    table = torch.cat((own.float().double(), top.values.float().double(), top.indices.double()), dim=1).tolist()
    return {at: _report(count, *line) for (at, count), line in zip(wanting.items(), table, strict=True)}


def _report(count: int, own: float, *top: float) -> Reported:
    half = len(top) // 2
    pairs = sorted(zip(map(int, top[half:]), top[:half], strict=True), key=lambda each: (-each[1], each[0]))
    return own, tuple(pairs[:count])
