"""Finds the longest text that a model reads: the limit in its files, corrected by forwards before the first job.

Files are often wrong: RoBERTa counts its positions from the padding token's id, tokenizers name no limit or that of
another model, and a user's `max_length` may be too large. So this module does not use the names of architectures. Two
short texts show which table the model looks up by position, and how many tokens that table has room for. On CUDA this
must be known before a long text runs, because a look-up beyond the table ends the process. Then longer and longer texts
run, up to the limit, to confirm it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millstream.broker.contract.errors import ModelUnavailable, described
from millstream.worker.models.base import ANY_LENGTH, Limit
from millstream.worker.scheduling.memory import is_exhaustion

log = logging.getLogger(__name__)

SHORT, LONGER = 3, 5
"""Tokens of the two texts whose look-ups are compared."""

FIRST, MOST = 64, 2_048
"""Tokens of the first and the longest text that tries the limit.

Attention may need some hundred times MOST squared bytes, and a start must not need gigabytes.
"""

FORWARD_S, GROWTH = 2.0, 3.0
"""FORWARD_S: seconds that a forward may be predicted to take, else it does not start. GROWTH: predicted factor.

Twice the tokens are predicted to take GROWTH times as long: layers take twice as long, attention four times.
"""

BISECTION_S = 10.0
"""Seconds after which the search for the longest text ends, with the longest text that ran."""

Forward = Callable[[int], object]
"""Runs the model over one text of that many tokens. May raise any exception."""

Clock = Callable[[], float]


def find_limit(limit: int, forward: Forward, max_length: int | None, clock: Clock = time.perf_counter) -> Limit:
    """Returns the limit that a model has. `limit` is the one, in tokens, that its files or `max_length` name.

    Raises ModelUnavailable if the model reads less than the configured `max_length`, or fails on a short text.
    """
    most = count_positions(forward)
    reads = limit if most is None else min(limit, most)
    _check_configured(max_length, reads)
    ran, failed = _grow(reads, forward, clock)
    if failed:
        reads = ran = _bisect(ran or LONGER, failed, forward, clock)
        _check_configured(max_length, reads)
    if reads < limit:
        log.info("the model's files name a limit of %d tokens, it reads %d", limit, reads)
    return Limit(min(reads, ANY_LENGTH), ran)


def count_positions(forward: Forward) -> int | None:
    """Returns the size of the smallest table that `forward` looks up by position, in tokens; None if it has none.

    Such a table has the same size for every text, and the largest index into it grows by one with each token.
    """
    short, longer = _lookups(forward, SHORT), _lookups(forward, LONGER)
    if len(short) != len(longer):
        return None
    pairs = zip(short, longer, strict=True)
    by_position = [one for one, other in pairs if one[0] == other[0] and other[1] - one[1] == LONGER - SHORT]
    return min((entries - (largest - (SHORT - 1)) for entries, largest in by_position), default=None)


def stretch(values: Sequence[int], tokens: int) -> list[int]:
    """Returns `values`, one for each token of a short text, for `tokens` tokens: the middle value is repeated."""
    middle = len(values) // 2
    tail = list(values[middle + 1 :])[: max(0, tokens - 1)]
    head = list(values[:middle])[: max(0, tokens - 1 - len(tail))]
    return [*head, *[values[middle]] * (tokens - len(head) - len(tail)), *tail]


def stretch_row(ids: Mapping[str, Sequence[int]], tokens: int) -> dict[str, list[int]]:
    """Stretches each input of a row, as `stretch` does."""
    return {name: stretch(values, tokens) for name, values in ids.items()}


class _Lookups(TorchDispatchMode):
    """Records each look-up by one row of indices: the number of entries of its table, and the largest index."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default:
            table, indices = args[:2]
            # Relative positions are looked up for each pair of tokens; their tables do not limit the length.
            if 0 < indices.numel() == indices.shape[-1]:
                self.records.append((table.shape[0], int(indices.max())))
        return func(*args, **(kwargs or {}))


def _lookups(forward: Forward, tokens: int) -> list[tuple[int, int]]:
    lookups = _Lookups()
    with lookups:
        _run(forward, tokens)
    return lookups.records


def _run(forward: Forward, tokens: int) -> None:
    """Runs one forward. Raises ModelUnavailable if it fails."""
    try:
        forward(tokens)
    except Exception as error:
        raise ModelUnavailable(f"the model fails on a text of {tokens} tokens: {described(error)}") from error


def _grow(limit: int, forward: Forward, clock: Clock) -> tuple[int, int]:
    """Runs longer and longer texts, up to `limit`.

    Returns the tokens of the longest text that ran and of the one that failed; 0 if there is none.
    """
    ran, seconds = 0, 0.0
    for tokens in _sizes(limit):
        if seconds * GROWTH > FORWARD_S:
            break
        began = clock()
        try:
            forward(tokens)
        except Exception as error:
            if is_exhaustion(error):
                break
            if "device-side assert" in str(error):
                raise ModelUnavailable(
                    f"the model cannot read {tokens} tokens: {described(error)}", hint="set a smaller max_length"
                ) from error
            log.debug("%d tokens are too many", tokens, exc_info=True)
            return ran, tokens
        ran, seconds = tokens, clock() - began
    return ran, 0


def _sizes(limit: int) -> Iterator[int]:
    most = min(limit, MOST)
    tokens = FIRST
    while tokens < most:
        yield tokens
        tokens *= 2
    yield most


def _bisect(good: int, bad: int, forward: Forward, clock: Clock) -> int:
    """Searches between `good` tokens, which run, and `bad` tokens, which fail. Returns the most tokens that ran.

    After BISECTION_S the search stops, so the result may be too low.
    """
    began = clock()
    while bad - good > 1 and clock() - began < BISECTION_S:
        middle = (good + bad) // 2
        try:
            forward(middle)
            good = middle
        except Exception:  # noqa: BLE001 - any failure means that these tokens do not run
            bad = middle
    if bad - good > 1:
        log.warning("the search for the longest text took over %g s: %d tokens run, %d do not", BISECTION_S, good, bad)
    return good


def _check_configured(max_length: int | None, reads: int) -> None:
    if max_length and max_length > reads:
        raise ModelUnavailable(
            f"max_length is {max_length}, and the model reads at most {reads} tokens",
            hint=f"set max_length: {reads}, or leave it out",
        )
