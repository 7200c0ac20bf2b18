"""`millstream route canary`: gives a version more and more of the calls while it is as good as the others."""

from __future__ import annotations

import secrets

import click
from pydantic import ValidationError

from millstream.broker.config.canary import CanaryPlan
from millstream.broker.config.route import RouteSpec
from millstream.broker.config.route_changes import check_version
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.queue.canaries import CanaryView, read_samples
from millstream.broker.queue.canary_judge import LEAST_CALLS, begin, known_others, weights_of
from millstream.broker.queue.canary_sample import Sample
from millstream.broker.queue.canary_state import CanaryState
from millstream.broker.queue.metrics import Metrics
from millstream.broker.queue.registry import Registry
from millstream.cli import options
from millstream.cli.completion import complete_services
from millstream.cli.groups import Group
from millstream.cli.route_views import check_services, check_workers, open_routes
from millstream.cli.table import age

_route = click.argument("route", shell_complete=complete_services)


@click.group(cls=Group)
def canary() -> None:
    """Give a version more and more of a route's calls, and take them back if it is worse than the others."""


@canary.command()
@_route
@click.argument("version", required=False)
@click.option("--steps", metavar="PERCENT,...", help="Shares of the calls; by default the file's, or else 1,5,25,100.")
@click.option("--every", callback=options.duration, metavar="DURATION", help="Time of each step; else 10m.")
@click.option("--max-error-rate", type=float, help="Share of failed rows above that of the others; else 0.01.")
@click.option("--max-p99-ratio", type=float, help="p99 of the time to the answer, divided by the others'; else 1.3.")
@click.option("--force", is_flag=True, help="Also if no worker of a version is alive, or a canary runs.")
@options.url
@options.prefix
def start(
    route: str,
    version: str | None,
    steps: str | None,
    every: float | None,
    max_error_rate: float | None,
    max_p99_ratio: float | None,
    force: bool,
    url: str | None,
    prefix: str | None,
) -> None:
    """Begin a canary of VERSION, by default the one that the file names under canary.

    A supervisor that runs one of the versions, `up` or `worker run`, drives it. `millstream route show` tells how.
    """
    given = {
        "to": version,
        "steps": steps.split(",") if steps else None,
        "every": every,
        "max_error_rate": max_error_rate,
        "max_p99_ratio": max_p99_ratio,
    }
    with open_routes(url, prefix) as (connection, routes, key_prefix):
        plan = _plan(routes.read(route), {name: value for name, value in given.items() if value is not None})
        metrics, now = Metrics(connection, key_prefix), routes.now(route)

        def first(standing: RouteSpec) -> CanaryState:
            running = routes.canary(standing)
            if running and running.state.is_running and not force:
                raise InvalidRequest(
                    f"a canary of route {route!r} runs already", hint=f"end it: `millstream route canary stop {route}`"
                )
            samples = read_samples(metrics, standing, plan.to, standing.weights)
            return begin(plan, standing.weights, samples, now, secrets.token_hex(8))

        standing = routes.read(route)
        check_services(Registry(connection, key_prefix), standing)
        if not force:
            weights = weights_of(standing.weights, plan.to, plan.steps[0])
            check_workers(connection, key_prefix, standing.model_copy(update={"weights": weights}))
        routes.start_canary(route, first)
    click.echo(f"{route}: {plan.to} gets {plan.steps[0]:g}% of the calls; clients follow within a second")


@canary.command()
@_route
@options.url
@options.prefix
def stop(route: str, url: str | None, prefix: str | None) -> None:
    """End the canary of ROUTE, and give the versions the weights that they had before it.

    `millstream route set` and `promote` end it, too, with weights of your choice.
    """
    with open_routes(url, prefix) as (_, routes, _prefix):

        def before(standing: RouteSpec) -> RouteSpec:
            view = routes.canary(standing)
            if view is None or not view.state.is_running:
                raise InvalidRequest(
                    f"no canary of route {route!r} runs", hint="`millstream route show` tells how it ended"
                )
            return standing.weighted({**dict.fromkeys(standing.services, 0.0), **view.state.before})

        routes.change(route, before)
    click.echo(f"{route}: the canary is ended; clients follow within a second")


def _plan(route: RouteSpec, given: dict[str, object]) -> CanaryPlan:
    """Returns the file's plan with what the options say instead. Raises InvalidRequest."""
    standing = route.canary.model_dump() if route.canary else {}
    if given.get("to", standing.get("to")) != standing.get("to"):
        standing = {}
    if not {"to"} & {*standing, *given}:
        raise InvalidRequest(f"route {route.name!r} has no canary in its file", hint="name the VERSION")
    try:
        plan = CanaryPlan.model_validate({**standing, **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(f"canary.{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from error
    check_version(route, plan.to)
    return plan


# -- what is shown of it ---------------------------------------------------------------------------------------------


def tell_canary(route: RouteSpec, view: CanaryView, samples: tuple[Sample, Sample]) -> str:
    """Returns a line on a canary. `samples` are the totals now of the new version and of the others."""
    state, past = view.state, age(max(0, view.now - view.state.since))
    name = f"{route.name}: canary of {state.plan.to}"
    if state.status == "promoted":
        return f"{name}: good, it gets all calls since {past}"
    if state.status == "rolled_back":
        return f"{name}: rolled back {past} ago: {state.reason}"
    new, others = _window(state, samples)
    step = f"step {state.step + 1} of {len(state.plan.steps)}, {state.plan.steps[state.step]:g}% for {past}"
    enough = "" if new.calls >= LEAST_CALLS else f" of {LEAST_CALLS} needed"
    driven = "" if view.driver else "; no supervisor drives it: run `millstream worker run` for one of the versions"
    return f"{name}: {step}: {new.calls} calls{enough}, {_rates(new)}; others {_rates(others)}{driven}"


def canary_record(view: CanaryView, samples: tuple[Sample, Sample]) -> dict[str, object]:
    """Returns what `route show --json` says of a canary. Times are in ms, rates are shares."""
    state = view.state
    new, others = _window(state, samples)
    return {
        "to": state.plan.to,
        "status": state.status,
        "reason": state.reason,
        "step": state.step + 1,
        "steps": list(state.plan.steps),
        "since_ms": max(0, view.now - state.since),
        "driver": view.driver,
        "before": state.before,
        "new": _figures(new),
        "others": _figures(others),
    }


def _window(state: CanaryState, samples: tuple[Sample, Sample]) -> tuple[Sample, Sample]:
    new, old = samples[0].since(state.new), samples[1].since(state.old)
    return new or samples[0], known_others(state, old or samples[1])


def _figures(sample: Sample) -> dict[str, object]:
    return {
        "calls": sample.calls,
        "rows": sample.rows,
        "failed": sample.failed,
        "error_rate": sample.error_rate,
        "p99_ms": sample.p99_ms,
    }


def _rates(sample: Sample) -> str:
    p99 = "unknown" if sample.p99_ms is None else f"{sample.p99_ms:.0f} ms"
    return f"{sample.error_rate:.1%} failed, p99 {p99}"
