"""Attempt of a call at one service: its jobs and their terms, made from the rows and options of the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Json, Priority
from millstream.broker.queue.cache import Cached
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL
from millstream.client.call_options import CallOptions, find_operation
from millstream.client.job_terms import CallChannel, JobTerms
from millstream.client.rows import split_rows
from millstream.client.split import Part
from millstream.client.version_choice import Chosen


class Attempt(NamedTuple):
    """A call as it is sent to one service: its jobs, and the rows in `given` that have their outcome before."""

    channel: CallChannel
    terms: JobTerms
    parts: Sequence[Part]
    given: Mapping[int, MillstreamError | Cached]


Fallback = Callable[[Sequence[Json]], Attempt]
"""Makes the attempt on the fallback from the call's rows as they are sent."""


def prepare_attempt(
    channel: CallChannel,
    chosen: Chosen,
    inputs: Sequence[Json],
    opts: CallOptions,
    hits: Mapping[int, Cached],
    beside: int,
) -> Attempt:
    """Returns a call of encoded `inputs` as it is sent to the chosen service. `beside` is as in measure_rows.

    Raises InvalidRequest.
    """
    spec = chosen.spec
    operation = find_operation(spec, opts.op)
    parts, refused = split_rows(spec, inputs, hits, beside)
    limits = spec.runtime.limits(opts.priority)
    terms = JobTerms(
        service=spec.name,
        op=operation.op,
        priority=Priority(opts.priority),
        options=opts.options,
        timeout=opts.timeout,
        total_timeout=limits.total_timeout,
        queue_timeout=limits.queue_timeout,
        wait=opts.wait,
        most_jobs=_limit_jobs(spec.runtime.queue_size(opts.priority)),
        tenant=opts.tenant,
        replicated=spec.replicated,
        limits_tenants=bool(opts.tenant) and spec.limits_tenants,
        idle_timeout=spec.runtime.total_timeout,
        at_once=spec.runtime.batch_size if operation.streams else 1,
        version=chosen.version,
    )
    given: dict[int, MillstreamError | Cached] = {**refused, **hits} if refused or hits else {}
    return Attempt(channel, terms, parts, given)


def _limit_jobs(queue_size: int) -> int:
    """Returns how many jobs one call keeps in flight at most: never more than a quarter of its priority's queue."""
    return max(1, min(queue_size // 4, MAX_JOBS_PER_CALL))
