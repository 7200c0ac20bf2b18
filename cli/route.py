"""`millstream route`: shows routes with their versions, and changes their weights while calls go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import click

from millstream.broker.config.route import RouteSpec
from millstream.broker.config.route_changes import promote, roll_back, set_weights
from millstream.broker.queue.registry import Registry
from millstream.cli import options
from millstream.cli.completion import complete_services
from millstream.cli.groups import Group
from millstream.cli.route_canary import canary, canary_record, tell_canary
from millstream.cli.route_shadows import ShadowView, find_shadows, tell_shadows
from millstream.cli.route_views import (
    CanaryNow,
    VersionView,
    check_services,
    check_workers,
    find_canary,
    find_versions,
    open_routes,
)
from millstream.cli.table import fit, terminal_width

_route = click.argument("route", shell_complete=complete_services)
_force = click.option("--force", is_flag=True, help="Also if no worker of a version is alive.")

_HEADING = ("ROUTE", "VERSION", "SERVICE", "WEIGHT", "SHARE", "WORKERS", "WAITING", "JOBS", "OK", "FAILED", "REFUSED")


@click.group("route", cls=Group)
def route() -> None:
    """Show the routes between versions of a service, and change their weights while calls go on."""


route.add_command(canary)


@route.command()
@click.argument("names", metavar="[ROUTE]...", nargs=-1, shell_complete=complete_services)
@options.url
@options.prefix
@options.json_output()
def show(names: Sequence[str], url: str | None, prefix: str | None, as_json: bool) -> None:
    """Show the versions of each ROUTE, by default of all: weights, live workers, waiting jobs, answers and failures.

    JOBS to REFUSED are totals of the version's service: accepted jobs, answered and failed rows, refused calls.
    """
    with open_routes(url, prefix) as (connection, routes, key_prefix):
        found = [routes.read(name) for name in names or routes.names()]
        views = [view for each in found for view in find_versions(connection, key_prefix, each)]
        shadows = {each.name: find_shadows(connection, key_prefix, each) for each in found}
        canaries = {each.name: find_canary(connection, key_prefix, each) for each in found}
    if as_json:
        click.echo(
            json.dumps([_record(each, views, shadows[each.name], canaries[each.name]) for each in found], indent=2)
        )
    elif found:
        click.echo(fit([_HEADING, *map(_row, views)], terminal_width(), ("REFUSED", "WAITING", "SERVICE", "JOBS")))
        for each in found:
            click.echo(f"{each.name}: sticky {each.sticky}, fallback {each.fallback or 'none'}")
            for line in tell_shadows(each, shadows[each.name]):
                click.echo(line)
            if canary_now := canaries[each.name]:
                click.echo(tell_canary(each, *canary_now))
    else:
        click.echo("no route is registered here: see docs/routes.md")


@route.command("set")
@_route
@click.argument("weights", metavar="VERSION=WEIGHT...", nargs=-1, required=True)
@_force
@options.url
@options.prefix
def set_(route: str, weights: Sequence[str], force: bool, url: str | None, prefix: str | None) -> None:
    """Give the versions of ROUTE other weights, such as v1=75 v2=25.

    Each version with a weight must be named. A new version v3 is the service ROUTE@v3, which must be registered.
    """
    given = dict(map(_read_weight, weights))
    _change(route, url, prefix, force, lambda standing: set_weights(standing, given))


@route.command("promote")
@_route
@click.argument("version")
@_force
@options.url
@options.prefix
def promote_(route: str, version: str, force: bool, url: str | None, prefix: str | None) -> None:
    """Send all calls of ROUTE to VERSION."""
    _change(route, url, prefix, force, lambda standing: promote(standing, version))


@route.command()
@_route
@_force
@options.url
@options.prefix
def rollback(route: str, force: bool, url: str | None, prefix: str | None) -> None:
    """Give the versions of ROUTE the weights that they had before the last change."""
    _change(route, url, prefix, force, roll_back)


def _change(
    name: str, url: str | None, prefix: str | None, force: bool, change: Callable[[RouteSpec], RouteSpec]
) -> None:
    """Changes a route's weights and prints them. Clients follow within a second."""
    with open_routes(url, prefix) as (connection, routes, key_prefix):
        planned = change(routes.read(name))
        check_services(Registry(connection, key_prefix), planned)
        if not force:
            check_workers(connection, key_prefix, planned)
        changed = routes.change(name, change)
    whole = sum(changed.weights.values())
    shares = ", ".join(f"{version} {weight / whole:.1%}" for version, weight in changed.weights.items())
    click.echo(f"{name}: {shares}; clients follow within a second")


def _record(
    route: RouteSpec, views: Sequence[VersionView], shadows: Sequence[ShadowView], canary_now: CanaryNow | None
) -> dict[str, object]:
    versions = [view._asdict() for view in views if view.route == route.name]
    return {
        "route": route.name,
        "sticky": route.sticky,
        "fallback": route.fallback,
        "previous": route.previous,
        "shadows": [shadow._asdict() for shadow in shadows],
        "canary": canary_record(*canary_now) if canary_now else None,
        "versions": [{key: value for key, value in each.items() if key != "route"} for each in versions],
    }


def _row(view: VersionView) -> tuple[str, ...]:
    figures = (view.workers, view.waiting, view.jobs, view.ok, view.failed, view.refused)
    shares = (f"{view.weight:g}", f"{view.share:.1%}")
    return (view.route, view.version, view.service, *shares, *map(str, figures))


def _read_weight(text: str) -> tuple[str, float]:
    version, equals, weight = text.partition("=")
    try:
        number = float(weight)
    except ValueError:
        number = -1.0
    if not (version and equals and 0 <= number <= 1e6):
        raise click.UsageError(f"{text!r} is not VERSION=WEIGHT with a weight from 0 to 1000000, such as v2=25.")
    return version, number
