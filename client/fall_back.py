"""Fallback of a call to another version of its route: when it happens, and how the call then goes on. Pure."""

from __future__ import annotations

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError, RateLimited, UnknownService
from millstream.broker.contract.job import Reply
from millstream.client.job_terms import JobTerms

FIRST_SHARE = 0.5
"""Share of a call's timeout after which it falls back if it is not answered. The fallback needs time, too."""


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
