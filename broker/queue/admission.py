"""What limits admission: a specification's limits as the service's fields, and a refusal as the error a caller gets."""

from __future__ import annotations

from millstream.broker.config.spec import RateLimit, Runtime
from millstream.broker.contract.errors import (
    InvalidRequest,
    MillstreamError,
    QueueFull,
    RateLimited,
    ServicePaused,
    UnknownService,
)
from millstream.broker.contract.job import PRIORITIES
from millstream.broker.queue.streams import Admission


def limit_fields(runtime: Runtime) -> dict[str, str | int | float]:
    """The fields of a service's hash that the enqueue script reads, "" for no limit.

    Each push writes all of them: a limit that is left out of config.yaml must not stay in force.
    """
    rate = runtime.rate_limit or RateLimit()
    return {
        "max_queue_size": runtime.max_queue_size,
        **{f"max_queue_{each}": runtime.limits(each.value).max_queue_size or "" for each in PRIORITIES},
        "rate_requests": rate.requests or "",
        "rate_rows": rate.rows or "",
        "rate_tokens": rate.tokens or "",
        "rate_burst_s": rate.burst_s,
        "rate_per": rate.per or "",
    }


def resume_hint(service: str) -> str:
    """What to do about a paused service."""
    return f"it goes on after `millstream queue resume {service}`"


def refusal(service: str, admission: Admission) -> MillstreamError | None:
    """The error of a group that was refused."""
    match admission.refused:
        case "":
            return None
        case "paused":
            message = f"service {service!r} is paused and takes no new jobs"
            return ServicePaused(message, hint=resume_hint(service), retry_after=admission.retry_after)
        case "queue_full":
            message = f"service {service!r} holds its max_queue_size of jobs"
            return QueueFull(message, hint="wait, or add workers", retry_after=admission.retry_after)
        case "rate_limited":
            message = f"the rate limit of service {service!r} is used up"
            return RateLimited(message, hint="wait", retry_after=admission.retry_after)
        case "over_burst":
            message = f"this call costs more than the rate limit of service {service!r} ever lets through at once"
            return InvalidRequest(message, hint="split it, or raise rate_limit.burst")
        case "reused_key":
            message = f"its idempotency key names a call of service {service!r} with another payload"
            return InvalidRequest(message, hint="send the same rows and options, or use another key")
        case "unknown_service":
            return UnknownService(f"service {service!r} is not registered", hint="run `millstream config push`")
