"""Chooses the next token of each text from the model's logits.

A row's token depends on its own logits, options and random number alone (`weights.py`), never on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Series
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from millstream.broker.contract.errors import MillstreamError, ModelFailed
from millstream.worker.generation.grammar import Grammar, excluded_by
from millstream.worker.generation.philox import uniforms
from millstream.worker.generation.record import Token
from millstream.worker.generation.weights import LOG_ONE, highest_of, weigh
from millstream.worker.models.base import NOT_FINITE

if TYPE_CHECKING:
    from millstream.worker.generation.sequence import Sequence
    from millstream.worker.generation.settings import Sampling

_TOGETHER = 32_768
"""Scores that are computed together on the CPU: 256 KiB."""

LEAST_LOGPROB = -9999.0
"""Log probability reported for tokens that the model excludes, as in OpenAI's API: JSON has no infinity."""


def choose(logits: torch.Tensor, sequences: Series[Sequence]) -> list[Token | MillstreamError]:
    """Returns the next token of each sequence, or its error: its logits are not finite, or its grammar failed.

    `logits`: float [rows, vocabulary], one row for each sequence, in order. It is not changed. If all rows take the
    most probable token, one pass over the logits and one transfer to the CPU are all that is done.
    """
    for each in sequences:
        if each.grammar:
            # Before any use of the logits: on a GPU the forward that computes them still runs.
            each.grammar.fill()
    logits = logits.detach()
    if logits.device.type == "cpu" and all(each.is_plain for each in sequences):
        return _plain(logits)
    peaks, ids = _most_probable(logits)
    faults: dict[int, MillstreamError] = {}
    drawn = [at for at, each in enumerate(sequences) if each.sampling.temperature > 0]
    adjusted = [at for at, each in enumerate(sequences) if not each.is_plain and each.sampling.temperature == 0]
    # For all rows at once: it takes as long as for one.
    numbers = uniforms([each.seed for each in sequences], [each.generated for each in sequences]) if drawn else None
    for part in _parts(drawn, logits) + _parts(adjusted, logits):
        rows = torch.tensor(part, device=logits.device)
        scores = _copy(logits, part)
        faults |= _adjust(scores, part, sequences)
        if numbers is not None and part[0] in drawn:
            highest = scores.amax(dim=-1)
            samplings = [sequences[at].sampling for at in part]
            ids[rows] = _draw(scores.sub_(highest[:, None]), samplings, numbers[part])
        else:
            highest, ids[rows] = _most_probable(scores)
        peaks[rows] = torch.where(peaks[rows].isfinite(), highest, math.nan)
    reported = _logprobs(logits, ids, sequences)
    table = torch.stack((ids.double(), peaks)).tolist()
    faults |= {at: ModelFailed(NOT_FINITE) for at, peak in enumerate(table[1]) if not math.isfinite(peak)}
    return [faults.get(at) or Token(int(token), *reported.get(at, ())) for at, token in enumerate(table[0])]


def _plain(logits: torch.Tensor) -> list[Token | MillstreamError]:
    """Returns the most probable token of each row, of logits on the CPU."""
    # numpy takes 6 us for 49,152 scores, torch 170.
    scores = _numbers(logits)
    ids = scores.argmax(axis=-1)
    peaks = scores[np.arange(len(ids)), ids]
    return [
        Token(token) if math.isfinite(peak) else ModelFailed(NOT_FINITE)
        for token, peak in zip(ids.tolist(), peaks.tolist(), strict=True)
    ]


def _numbers(scores: torch.Tensor) -> NDArray[Any]:
    """Returns scores on the CPU as float64, if they are, or as float32."""
    return (scores if scores.dtype is torch.float64 else scores.float()).numpy()


def _parts(rows: list[int], logits: torch.Tensor) -> list[list[int]]:
    """Returns the rows to compute together: on the CPU as many as fit its cache."""
    count = max(1, _TOGETHER // logits.shape[-1]) if logits.device.type == "cpu" else len(rows)
    return [rows[at : at + count] for at in range(0, len(rows), max(1, count))]


def _copy(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Returns rows as float64 [rows, vocabulary]."""
    chosen = logits[rows[0] : rows[0] + 1] if len(rows) == 1 else logits[rows]
    return chosen.to(torch.float64, copy=True)


def _most_probable(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the highest score of each row and its id, the lowest one of equals: float64 [rows], int64 [rows]."""
    if scores.device.type != "cpu":
        peaks, ids = scores.max(dim=-1)
        return peaks.double(), ids
    wide = scores if scores.dtype is torch.float64 else scores.float()
    ids = torch.from_numpy(_numbers(wide).argmax(axis=-1))
    return wide.gather(1, ids[:, None])[:, 0].double(), ids


def _adjust(scores: torch.Tensor, part: Series[int], sequences: Series[Sequence]) -> Mapping[int, MillstreamError]:
    """Applies penalties, biases and grammars to the logits of the rows `part`, in this order. Returns their faults."""
    followers: list[int] = []
    for at, number in enumerate(part):
        sequence = sequences[number]
        sampling = sequence.sampling
        if sampling.penalises:
            sequence.occurrences.penalise(
                scores[at], sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
            )
        if sequence.options.logit_bias:
            sequence.biases.apply(scores[at])
        if sequence.grammar:
            followers.append(at)
    if not followers:
        return {}
    grammars = {at: cast(Grammar, sequences[part[at]].grammar) for at in followers}
    excluded = torch.from_numpy(excluded_by(list(grammars.values()), scores.shape[-1])).to(scores.device)
    if len(followers) == len(part):
        scores.masked_fill_(excluded, -torch.inf)
    else:
        scores[followers] = scores[followers].masked_fill_(excluded, -torch.inf)
    return {part[at]: fault for at, each in grammars.items() if (fault := each.fault)}


def _draw(scores: torch.Tensor, samplings: Series[Sampling], numbers: NDArray[np.float64]) -> torch.Tensor:
    """Returns ids drawn at random, int64 [rows]. The numbers, in (0, 1), choose in the order of token ids.

    `scores`: adjusted logits less the highest one of their row, float64 [rows, vocabulary], which are changed.
    """
    # The tokens that top_k excludes anyway are dropped before they cost time.
    ids = highest_of(scores[0], samplings[0].top_k) if len(samplings) == 1 else None
    reach = weigh(scores if ids is None else scores[:, ids], samplings).cumsum(dim=-1)
    last = reach[:, -1:] - 1
    at = (torch.from_numpy(numbers).to(scores.device)[:, None] * reach[:, -1:]).long()
    drawn = torch.searchsorted(reach, torch.minimum(at, last), right=True)[:, 0].clamp_(0, reach.shape[-1] - 1)
    return drawn if ids is None else ids[drawn]


Reported = tuple[float, tuple[tuple[int, float], ...]]
"""The log probability of a token, and the most probable tokens with theirs."""


def _logprobs(logits: torch.Tensor, ids: torch.Tensor, sequences: Series[Sequence]) -> dict[int, Reported]:
    """Returns log probabilities for the rows that ask for them, by row: those of the model's own logits."""
    wanting = {at: count for at, each in enumerate(sequences) if (count := each.options.logprobs) is not None}
    if not wanting:
        return {}
    most = min(max(wanting.values()), logits.shape[-1])
    tables = []
    for part in _parts(list(wanting), logits):
        rows = torch.tensor(part, device=logits.device)
        scores = _copy(logits, part)
        scores -= scores.amax(dim=-1, keepdim=True)
        own = scores.gather(1, ids[rows, None])
        among = highest_of(scores[0], most) if len(part) == 1 else None
        values, top = (scores if among is None else scores[:, among]).topk(most)
        top = top if among is None else among[top]
        total = scores.add_(LOG_ONE).exp_().long().sum(dim=-1, keepdim=True)
        values = torch.cat((own, values), dim=1) - (total.double().log() - LOG_ONE)
        # Log probabilities become float32 values, as records have them. Ids are exact in float64.
        tables.append(torch.cat((values.clamp_(min=LEAST_LOGPROB).float().double(), top.double()), dim=1))
    lines = torch.cat(tables).tolist()
    return {at: _report(count, *line) for (at, count), line in zip(wanting.items(), lines, strict=True)}


def _report(count: int, own: float, *top: float) -> Reported:
    half = len(top) // 2
    pairs = sorted(zip(map(int, top[half:]), top[:half], strict=True), key=lambda each: (-each[1], each[0]))
    return own, tuple(pairs[:count])
