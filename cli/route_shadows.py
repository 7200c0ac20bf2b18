"""Shadows of a route as `millstream route show` shows them: how far the answers of versions agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from millstream.broker.config.route import RouteSpec
from millstream.broker.queue.figure_text import latency
from millstream.broker.queue.metrics import Metrics
from millstream.broker.transport.connection import Connection
from millstream.cli.table import number


class ShadowView(NamedTuple):
    """Copies of calls that a version got. The counts are totals of its service, see Metrics.

    `share` is the part of the calls that is copied, 0 to 1. `agreement` is the mean, `least` is what 95 % of the copies
    reach; both are None before the first comparison. `p99_ms` is the 99th percentile of the time to the answer, ms.
    """

    version: str
    share: float
    compared: int
    failed: int
    dropped: int
    agreement: float | None
    least: float | None
    p99_ms: float | None


def find_shadows(connection: Connection, prefix: str, route: RouteSpec) -> list[ShadowView]:
    """Returns the shadows of a route as they are now."""
    services = [route.services[version] for version in route.shadow]
    found = Metrics(connection, prefix).services(services) if services else []
    return [
        ShadowView(
            version=version,
            share=share,
            compared=total.shadows.get("compared", 0),
            failed=total.shadows.get("failed", 0),
            dropped=total.shadows.get("dropped", 0),
            agreement=total.histograms["shadow_agreement"].mean,
            least=total.histograms["shadow_agreement"].quantile(0.05),
            p99_ms=total.histograms["shadow_latency"].quantile(0.99),
        )
        for (version, share), total in zip(route.shadow.items(), found, strict=True)
    ]


def tell_shadows(route: RouteSpec, shadows: Sequence[ShadowView]) -> Iterator[str]:
    """Yields a line on each shadow."""
    for each in shadows:
        agreement = f"agreement {number(each.agreement, 3)}, 95% above {number(each.least, 3)}"
        counts = f"{each.compared} compared, {each.failed} failed, {each.dropped} dropped"
        off = "; off beside a canary" if route.canary_run else ""
        name = f"{route.name}: shadow of {each.version}, {each.share:.1%} of the calls{off}"
        yield f"{name}: {counts}; {agreement}, p99 {latency(each.p99_ms)}"
