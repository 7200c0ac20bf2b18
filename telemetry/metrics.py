"""All metrics of the exporter in one table, and how each is read from a service. Pure.

Names, units and types follow Prometheus' conventions: seconds, and `_total` for counters. Each metric has the label
`service` and at most one more, whose values are priorities, reasons, codes or states, never ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from millstream.broker.contract import errors
from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.contract.metrics import SHADOW_ENDS
from millstream.broker.queue.canary_state import STATUSES
from millstream.broker.queue.metrics import HistogramView, ServiceMetrics, backlog_s
from millstream.broker.queue.views import ServiceView

Kind = Literal["gauge", "counter", "histogram"]

UP = "millstream_up"
"""1 if the server answered, 0 if not; the only metric without the label `service`."""

UP_HELP = "1 if the Redis server answered, 0 if it did not: then there are no other metrics."

REASONS = ("paused", "queue_full", "rate_limited", "over_burst")
"""Reasons of refused calls. They have a series from the beginning, so that a rate sees the first refusal."""

BURIED = ("max_attempts", "malformed", "newer version", "reply_unwritable")
"""Reasons of dead letters."""

WEBHOOK_ENDS = ("delivered", "given_up")
"""Ends of the announcement of a detached call to its webhook."""

UNWRITABLE = "reply_unwritable"
"""Code of rows whose reply could not be written; they are in a dead letter."""

CODES = (
    *(
        cls.code
        for cls in (
            errors.InvalidRequest,
            errors.InputTooLong,
            errors.DeadlineExceeded,
            errors.ModelFailed,
            errors.WorkerLost,
            errors.Cancelled,
            errors.UnsupportedVersion,
            errors.ReplyTooLarge,
            errors.ReaderTooSlow,
        )
    ),
    UNWRITABLE,
)
"""Codes of errors that a job's rows may have."""

STATES = ("ready", "paused", "away", "draining", "standby", "loading", "evicting")
"""States of live workers: `away` if the server behind them cannot be reached. The last three: of a pool."""


NO_SHARES: Mapping[str, float] = MappingProxyType({})


class Reading(NamedTuple):
    """A service now, and its totals.

    `shares` are its parts of the calls, 0 to 1, by route that it is a version of. `canary` is the state of the canary
    that was started last for it, "" for none.
    """

    view: ServiceView
    totals: ServiceMetrics
    shares: Mapping[str, float] = NO_SHARES
    canary: str = ""


Values = Mapping[str, float]
Histograms = Mapping[str, HistogramView]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `name` is that in the output, `label` the label beside `service`, "" if there is none.

    `values` gives a number for each value of the label ("" without a label), `histograms` a histogram, whose values are
    multiplied by `scale`. A service without a value has no series.
    """

    name: str
    kind: Kind
    help: str
    unit: str
    label: str = ""
    values: Callable[[Reading], Values] = lambda reading: {}
    histograms: Callable[[Reading], Histograms] = lambda reading: {}
    scale: float = 1.0


Read = Callable[[Reading], Values | float | None]
"""Reads a metric: a number for each value of its label, or one number, or None if it is unknown."""


def _gauge(name: str, help: str, unit: str, read: Read, label: str = "") -> Metric:
    return Metric(f"millstream_{name}", "gauge", help, unit, label, lambda reading: _values(read(reading)))


def _counter(name: str, help: str, unit: str, read: Read, label: str = "") -> Metric:
    return Metric(f"millstream_{name}_total", "counter", help, unit, label, lambda reading: _values(read(reading)))


def _work(name: str, help: str, unit: str, field: str, scale: float = 1.0) -> Metric:
    return _counter(name, help, unit, lambda reading: reading.totals.work[field] * scale)


def _histogram(name: str, help: str, unit: str, field: str, label: str = "") -> Metric:
    scale = 0.001 if unit == "seconds" else 1.0
    return Metric(
        f"millstream_{name}",
        "histogram",
        help,
        unit,
        label,
        histograms=lambda reading: _of_field(reading.totals.histograms, field),
        scale=scale,
    )


def _of_field(histograms: Histograms, field: str) -> Histograms:
    """Returns the histograms of `field` by its label: `wait:normal` is "normal", `inference` is ""."""
    parts = {name: name.partition(":") for name in histograms}
    return {label: histograms[name] for name, (start, _, label) in parts.items() if start == field}


def _values(found: Values | float | None) -> Values:
    if found is None:
        return {}
    return found if isinstance(found, Mapping) else {"": found}


def _by_priority(counts: Mapping[Priority, int]) -> Values:
    return {priority.value: count for priority, count in counts.items()}


def _from_zero(counts: Mapping[str, int], names: Iterable[str]) -> Values:
    return {**dict.fromkeys(names, 0), **counts}


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def _states(view: ServiceView) -> Values:
    return _from_zero(Counter(each.state for each in view.workers), STATES)


def _loads(view: ServiceView) -> float | None:
    pools = [each.loads_minute for each in view.workers if each.memory]
    return sum(pools) if pools else None


METRICS: tuple[Metric, ...] = (
    _gauge(
        "jobs_waiting",
        "Jobs that wait for their first claim.",
        "jobs",
        lambda now: _by_priority(now.view.waiting),
        "priority",
    ),
    _gauge("jobs_returned", "Jobs that a worker gave back and that wait again.", "jobs", lambda now: now.view.returned),
    _gauge("jobs_in_flight", "Jobs that a worker holds.", "jobs", lambda now: now.view.in_flight),
    _gauge(
        "queue_jobs",
        "Jobs that wait or are in flight: max_queue_size limits them.",
        "jobs",
        lambda now: _by_priority(now.view.unsettled),
        "priority",
    ),
    _gauge(
        "oldest_job_age_seconds",
        "Age of the oldest job, waiting or in flight; 0 if there is none.",
        "seconds",
        lambda now: (now.view.oldest_ms or 0) / 1000,
    ),
    _gauge(
        "backlog_seconds",
        "Seconds until all waiting jobs would be answered, as fast as the workers were so far. Without a live worker, "
        "by one. No series while jobs wait and none ever ran.",
        "seconds",
        lambda now: backlog_s(now.view, now.totals),
    ),
    _gauge(
        "nearest_deadline_seconds",
        "Seconds to the nearest deadline of the oldest job of each priority; below 0 if it has passed. No series if "
        "none of them has a deadline.",
        "seconds",
        lambda now: _seconds(now.view.deadline_ms),
    ),
    _gauge(
        "workers",
        "Live workers by state. Only ready ones claim jobs.",
        "workers",
        lambda now: _states(now.view),
        "state",
    ),
    _gauge(
        "model_memory_bytes",
        "Memory of the model in each process of a pool, as measured at its first load. No series without a pool.",
        "bytes",
        lambda now: max((each.memory for each in now.view.workers), default=0) or None,
    ),
    _gauge(
        "model_loads_per_minute",
        "Loads of the model in the last minute, in all processes of pools. No series without a pool.",
        "loads",
        lambda now: _loads(now.view),
    ),
    _gauge("paused", "1 if the service is paused.", "", lambda now: float(now.view.paused is not None)),
    _gauge(
        "route_share",
        "Part of a route's calls that the service gets as one of its versions, 0 to 1.",
        "ratio",
        lambda now: now.shares,
        "route",
    ),
    _gauge(
        "canary",
        "1 for the state of the canary that was started last for the service; no series if its route's weights were "
        "changed since.",
        "",
        lambda now: {each: float(each == now.canary) for each in STATUSES} if now.canary else None,
        "status",
    ),
    _gauge("dead_letters", "Dead letters that are stored.", "jobs", lambda now: now.view.dead_letters),
    _counter(
        "jobs_accepted", "Jobs that were accepted.", "jobs", lambda now: _by_priority(now.totals.jobs), "priority"
    ),
    _counter("rows_accepted", "Rows of accepted jobs.", "rows", lambda now: _by_priority(now.totals.rows), "priority"),
    _counter(
        "calls_refused",
        "Calls that were refused, each once however often it was sent again.",
        "calls",
        lambda now: _from_zero(now.totals.refused, REASONS),
        "reason",
    ),
    _counter(
        "jobs_settled",
        "Jobs that left the queue: answered, cancelled or purged.",
        "jobs",
        lambda now: now.totals.settled,
    ),
    _counter("rows_answered", "Rows that were answered with a result.", "rows", lambda now: now.totals.ok),
    _counter(
        "rows_failed",
        "Rows that were answered with an error.",
        "rows",
        lambda now: _from_zero(now.totals.failed, CODES),
        "code",
    ),
    _counter(
        "jobs_buried",
        "Jobs that became dead letters.",
        "jobs",
        lambda now: _from_zero(now.totals.buried, BURIED),
        "reason",
    ),
    _counter(
        "webhooks",
        "Announcements of detached calls that their webhook accepted, or that were given up.",
        "announcements",
        lambda now: _from_zero(now.totals.webhooks, WEBHOOK_ENDS),
        "outcome",
    ),
    _counter(
        "shadows",
        "Copies of calls to another version: compared with the call, failed, or dropped by client or queue.",
        "calls",
        lambda now: _from_zero(now.totals.shadows, SHADOW_ENDS),
        "outcome",
    ),
    _counter("rows_cached", "Rows that clients found in the cache.", "rows", lambda now: now.totals.cached),
    _work("batches", "Forwards of the model.", "batches", "forwards"),
    _work("rows_run", "Rows of all batches.", "rows", "rows"),
    _work("tokens_run", "Tokens of all batches, without padding.", "tokens", "tokens"),
    _work("tokens_padding", "Tokens that were computed as padding.", "tokens", "padding_tokens"),
    _work("tokens_input", "Tokens of inputs of answered jobs.", "tokens", "tokens_in"),
    _work("tokens_output", "Tokens of generated texts.", "tokens", "tokens_out"),
    _work("tokens_reused", "Tokens of prompts whose keys and values were computed before.", "tokens", "tokens_reused"),
    _work("busy_seconds", "Time in forwards, of all workers.", "seconds", "busy_ms", 0.001),
    _work("answers_late", "Answers to jobs that were settled before, by another worker.", "jobs", "late"),
    _histogram("wait_seconds", "Time from acceptance to the first forward.", "seconds", "wait", "priority"),
    _histogram(
        "latency_seconds", "Time from acceptance to the answer, of jobs that ran.", "seconds", "total", "priority"
    ),
    _histogram("inference_seconds", "Time in the model, of jobs that ran.", "seconds", "inference"),
    _histogram(
        "first_token_seconds", "Time from acceptance to the first piece of a generated text.", "seconds", "first_token"
    ),
    _histogram("between_tokens_seconds", "Time between two pieces of a generated text.", "seconds", "between_tokens"),
    _histogram(
        "shadow_agreement",
        "Agreement of copies with their calls, 0 to 1: cosine of vectors, rank correlation of scores, else share of "
        "equal rows.",
        "ratio",
        "shadow_agreement",
    ),
    _histogram("shadow_latency_seconds", "Time to the answer of a copy.", "seconds", "shadow_latency"),
    _histogram("batch_rows", "Rows of a forward.", "rows", "batch_rows"),
    _histogram("batch_tokens", "Tokens of a forward, padding included.", "tokens", "batch_tokens"),
    _histogram("padding_ratio", "Computed tokens for each token of the inputs; 1 without padding.", "ratio", "padding"),
)
"""All metrics but UP, in the order of the output."""

LABELS: Mapping[str, Sequence[str]] = {
    "priority": [priority.value for priority in PRIORITIES],
    "state": STATES,
    "code": CODES,
    "reason": (*REASONS, *BURIED),
    "outcome": (*WEBHOOK_ENDS, *SHADOW_ENDS),
    "status": STATUSES,
    "route": (),
}
"""Values of the labels beside `service`; none for a label of names. Workers of other versions may add some."""
