"""Rules that name what an operator should know of the canaries of routes. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from millstream.broker.config.route import RouteSpec
from millstream.broker.queue.canaries import CanaryView
from millstream.broker.queue.diagnosis import Finding
from millstream.broker.queue.figure_text import age


def diagnose_canary(route: RouteSpec, canary: CanaryView) -> Iterator[Finding]:
    """Yields what is wrong with the canary of a route. The service of a finding is the route's name."""
    state, name = canary.state, shlex.quote(route.name)
    if state.status == "rolled_back":
        past = age(max(0, canary.now - state.since))
        yield Finding(
            "warning",
            route.name,
            "canary_rolled_back",
            f"the canary of version {state.plan.to} was rolled back {past} ago: {state.reason}",
            f"mend that version, then millstream route canary start {name} {shlex.quote(state.plan.to)}; "
            f"millstream route set {name} ends this warning",
        )
    elif state.is_running and not canary.driver:
        services = " ".join(shlex.quote(service) for service in route.services.values())
        yield Finding(
            "warning",
            route.name,
            "canary_without_driver",
            f"no supervisor drives the canary of version {state.plan.to}: it stays at "
            f"{state.plan.steps[state.step]:g}%",
            f"millstream worker run {services}",
        )
