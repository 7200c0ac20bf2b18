"""Fallback of a call to another version of its route: when it happens, and how the call then goes on. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError, RateLimited, UnknownService
from millstream.broker.contract.job import Json, Reply
from millstream.broker.queue.cache import Cached
from millstream.client.job_terms import CallChannel, JobTerms
from millstream.client.split import Part

FIRST_SHARE = 0.5
"""Share of a call's timeout after which it falls back if it is not answered. The fallback needs time, too."""


class Attempt(NamedTuple):
    """A call as it is sent to one service: its jobs, and the rows in `given` that have their outcome before."""

    channel: CallChannel
    terms: JobTerms
    parts: Sequence[Part]
    given: Mapping[int, MillstreamError | Cached]


Fallback = Callable[[Sequence[Json]], Attempt]
"""Makes the attempt on the fallback from the call's rows as they are sent."""


def impatient(terms: JobTerms) -> JobTerms:
    """Returns the terms of a call that has a fallback: a full queue is a reason to fall back, so it does not wait."""
    return terms._replace(wait=False)


def falls_back(outcome: Reply | MillstreamError) -> bool:
    """Returns whether a call runs again on its fallback after one of its jobs had this outcome.

    It does if a row failed for a reason that another version may not have. A rate limit holds for the caller, whichever
    version it gets, and a server that is away is away for all versions.
    """
    if isinstance(outcome, MillstreamError):
        return _may_pass(outcome)
    errors = [*outcome.errors.values(), *([outcome.error] if outcome.error else [])]
    return any(map(_may_pass, errors))


def _may_pass(error: MillstreamError) -> bool:
    if isinstance(error, BrokerUnavailable | RateLimited):
        return False
    return error.fault != "caller" or isinstance(error, UnknownService)
