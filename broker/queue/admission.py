"""Limits of admission: converts a specification's limits to fields of the service, and a refusal to an error."""

from __future__ import annotations

from millstream.broker.config.rate_limit import RateLimit
from millstream.broker.config.spec import Runtime
from millstream.broker.contract.errors import (
    InvalidRequest,
    MillstreamError,
    QueueFull,
    RateLimited,
    ServicePaused,
    UnknownService,
)
from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.contract.keys import STREAM_INDEX
from millstream.broker.queue.stream_types import Admission

FAIR_FIELD, FAIR, WAS_FAIR = "fair", "tenant", "off"
"""Field of a service with `fair`, and its values: WAS_FAIR if `fair` was removed, empty or missing if it never had it.
Claims of a service that was fair give back what is left in the index."""

WEIGHT = "weight:"
"""Begin of the field with a tenant's weight."""


def limit_fields(runtime: Runtime) -> dict[str, str | int | float]:
    """Returns the fields of a service's hash that scripts read, "" for no limit.

    Each push writes all of them, so a limit that was removed from config.yaml does not stay in force.
    """
    rate = runtime.rate_limit or RateLimit()
    sizes = {f"max_queue_{each}": runtime.queue_size(each.value) for each in PRIORITIES}
    weights = runtime.fair.weights if runtime.fair else {}
    return {
        # Clients of older versions also count the jobs of all priorities together. Up to the sum, that refuses nothing.
        "max_queue_size": sum(sizes.values()),
        **sizes,
        "rate_requests": rate.requests or "",
        "rate_rows": rate.rows or "",
        "rate_tokens": rate.tokens or "",
        "rate_burst_s": rate.burst_s,
        "rate_per": rate.per or "",
        "rate_beyond": STREAM_INDEX[Priority(rate.overflow)] if rate.overflow else "",
        "fair": FAIR if runtime.fair else "",
        "max_in_flight": (runtime.fair and runtime.fair.max_in_flight) or "",
        "max_queue_tenant": runtime.tenant_jobs or "",
        # How many tenants have a weight, so that claims without any look for none.
        "fair_weights": len(weights),
        **{f"{WEIGHT}{tenant}": weight for tenant, weight in weights.items()},
    }


def resume_hint(service: str) -> str:
    """Returns the hint for a paused service."""
    return f"`millstream queue resume {service}` ends the pause"


def refusal(service: str, priority: Priority, admission: Admission) -> MillstreamError | None:
    """Returns the error of a refused group of this priority, None if it was accepted."""
    match admission.refused:
        case "":
            return None
        case "paused":
            message = f"service {service!r} is paused and refuses new jobs"
            return ServicePaused(message, hint=resume_hint(service), retry_after=admission.retry_after)
        case "queue_full":
            message = (
                f"the queue of service {service!r} is full for priority {priority}: max_queue_size is {admission.limit}"
            )
            return QueueFull(message, hint="wait, or add workers", retry_after=admission.retry_after)
        case "tenant_full":
            message = (
                f"the tenant of this call has {admission.limit} jobs of priority {priority} that wait in service "
                f"{service!r}, which is max_queue_size.per_tenant"
            )
            return QueueFull(message, hint="wait, or send less at once", retry_after=admission.retry_after)
        case "rate_limited":
            message = f"the rate limit of service {service!r} is used up"
            return RateLimited(message, hint="wait", retry_after=admission.retry_after)
        case "over_burst":
            message = f"this call costs more than the rate limit of service {service!r} allows at once"
            return InvalidRequest(message, hint="split it, or raise rate_limit.burst")
        case "reused_key":
            message = f"service {service!r} has a call with this idempotency key and another payload"
            return InvalidRequest(message, hint="send the same rows and options, or use another key")
        case "unknown_service":
            return UnknownService(f"service {service!r} is not registered", hint="run `millstream config push`")
