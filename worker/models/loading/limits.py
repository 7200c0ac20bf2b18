"""The longest text a model reads: what its files say, corrected by running it before the first job does.

Files are wrong in many ways: RoBERTa counts its positions from the padding token's id, tokenizers name no limit or one
of another model, and so does a user's `max_length`. So nothing here looks at the name of an architecture. Two short
texts show which table a model looks up by position and how many texts longer it lasts; on CUDA that must be known
beforehand, since a look-up beyond the table ends the process. A text as long as the limit then confirms it.
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
"""Tokens. The first text of those that grow towards the limit, and the longest: attention may need its square in bytes
some hundred times, and a start must not need gigabytes."""

FORWARD_S, GROWTH = 2.0, 3.0
"""No forward starts that is predicted to take more seconds. One over twice the tokens is predicted to take GROWTH times
as long: layers take twice, attention four times."""

BISECTION_S = 10.0
"""Seconds after which the search for the longest text that runs ends with the longest that ran."""

Forward = Callable[[int], object]
"""Runs the model over one text of so many tokens. May raise anything."""

Clock = Callable[[], float]


def settled(named: int, forward: Forward, configured: int | None, clock: Clock = time.perf_counter) -> Limit:
    """The limit of a model whose files, or `configured`, its max_length, name `named` tokens.

    Raises ModelUnavailable if the model reads less than `configured`, or fails on a short text.
    """
    most = positions(forward)
    reads = named if most is None else min(named, most)
    _check_configured(configured, reads)
    ran, failed = _grown(reads, forward, clock)
    if failed:
        reads = ran = _between(ran or LONGER, failed, forward, clock)
        _check_configured(configured, reads)
    if reads < named:
        log.info("the model's files name a limit of %d tokens, it reads %d", named, reads)
    return Limit(min(reads, ANY_LENGTH), ran)


def positions(forward: Forward) -> int | None:
    """The length of the shortest table that `forward` looks up by position, in tokens; None if there is none.

    Such a table is as long for every text, and the largest index into it grows by one with each token.
    """
    short, longer = _lookups(forward, SHORT), _lookups(forward, LONGER)
    if len(short) != len(longer):
        return None
    pairs = zip(short, longer, strict=True)
    by_position = [one for one, other in pairs if one[0] == other[0] and other[1] - one[1] == LONGER - SHORT]
    return min((entries - (largest - (SHORT - 1)) for entries, largest in by_position), default=None)


def stretched(values: Sequence[int], tokens: int) -> list[int]:
    """`values`, one a token of a short text, for a text of `tokens` tokens: the middle one is repeated."""
    middle = len(values) // 2
    tail = list(values[middle + 1 :])[: max(0, tokens - 1)]
    head = list(values[:middle])[: max(0, tokens - 1 - len(tail))]
    return [*head, *[values[middle]] * (tokens - len(head) - len(tail)), *tail]


def stretched_row(ids: Mapping[str, Sequence[int]], tokens: int) -> dict[str, list[int]]:
    """Each of a row's inputs, stretched as `stretched` does."""
    return {name: stretched(values, tokens) for name, values in ids.items()}


class _Lookups(TorchDispatchMode):
    """Notes of each look-up by one row of indices: the entries of its table, and the largest index."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default:
            table, indices = args[:2]
            # Relative positions are looked up for each pair of tokens, and their tables serve any length.
            if 0 < indices.numel() == indices.shape[-1]:
                self.found.append((table.shape[0], int(indices.max())))
        return func(*args, **(kwargs or {}))


def _lookups(forward: Forward, tokens: int) -> list[tuple[int, int]]:
    lookups = _Lookups()
    with lookups:
        _run(forward, tokens)
    return lookups.found


def _run(forward: Forward, tokens: int) -> None:
    """Raises ModelUnavailable for any fault."""
    try:
        forward(tokens)
    except Exception as error:
        raise ModelUnavailable(f"the model fails on a text of {tokens} tokens: {described(error)}") from error


def _grown(limit: int, forward: Forward, clock: Clock) -> tuple[int, int]:
    """The longest text that ran, of those that grow to `limit`, and the shortest that failed; 0 if there is none."""
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


def _between(good: int, bad: int, forward: Forward, clock: Clock) -> int:
    """The most tokens that run, between `good`, which do, and `bad`, which do not; after BISECTION_S one of fewer."""
    began = clock()
    while bad - good > 1 and clock() - began < BISECTION_S:
        middle = (good + bad) // 2
        try:
            forward(middle)
            good = middle
        except Exception:  # noqa: BLE001 - whatever it is, so many tokens do not run
            bad = middle
    if bad - good > 1:
        log.warning("the longest text was searched for %g s: %d tokens run, %d do not", BISECTION_S, good, bad)
    return good


def _check_configured(configured: int | None, reads: int) -> None:
    if configured and configured > reads:
        raise ModelUnavailable(
            f"max_length is {configured}, and the model reads at most {reads} tokens",
            hint=f"set max_length: {reads}, or leave it out",
        )
