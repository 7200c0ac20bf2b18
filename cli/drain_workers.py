"""`millstream worker drain`, `stop` and `start`: the commands by which an operator empties a host or a device."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import click

from millstream.broker.contract.errors import DeadlineExceeded, InvalidRequest, did_you_mean
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.drains import Drains, Order, is_on
from millstream.broker.queue.inspector import Inspector, ServiceView
from millstream.broker.transport.connection import translated
from millstream.cli import options
from millstream.cli.server import connect, find_server
from millstream.cli.table import quantity

_POLL_S = 0.2
_MOST_NAMED = 12
"""Names that an error lists at most."""

_places = click.argument("places", metavar="WORKER|HOST...", nargs=-1, required=True)
_wait_timeout = options.wait_timeout("Longest wait for the workers to end.")
_no_wait = click.option("--no-wait", is_flag=True, help="Give the order, and do not wait for the workers to end.")


@dataclass(frozen=True, slots=True)
class Subject:
    """Service in which an order is given, the worker or host that it names, and the live workers that will end."""

    service: str
    place: str
    consumers: frozenset[str]


@click.command()
@_places
@options.url
@options.prefix
@_wait_timeout
@_no_wait
def drain(places: tuple[str, ...], url: str | None, prefix: str | None, timeout_s: float, no_wait: bool) -> None:
    """Let each WORKER, or all workers of each HOST, finish the jobs that they hold and end.

    They claim nothing more, and none starts in their place until `millstream worker start`: also not if the supervisor
    of a drained HOST is restarted, while a restart forgets single workers. What still runs after the --drain-timeout of
    the supervisor is given back to the queue. Other workers go on. `millstream worker ls` has the names.
    """
    _order("drain", places, url, prefix, None if no_wait else timeout_s)


@click.command()
@_places
@options.url
@options.prefix
@_wait_timeout
@_no_wait
def stop(places: tuple[str, ...], url: str | None, prefix: str | None, timeout_s: float, no_wait: bool) -> None:
    """End each WORKER, or all workers of each HOST, at once. Their jobs are given back, without an attempt.

    None starts in their place until `millstream worker start`, as after `millstream worker drain`.
    """
    _order("stop", places, url, prefix, None if no_wait else timeout_s)


@click.command()
@_places
@options.url
@options.prefix
def start(places: tuple[str, ...], url: str | None, prefix: str | None) -> None:
    """Let workers start again in place of each drained or stopped WORKER, or on each HOST.

    HOST means all that was drained or stopped there, single workers included. Their supervisor starts them within about
    a second; if no supervisor runs there, start one with `millstream worker run`.
    """
    target = find_server(url, prefix)
    with connect(target.url) as connection, translated(connection.safe_url):
        views = Inspector(connection, target.prefix).services()
        found = {place: find_orders(views, place) for place in places}
        for place, names in found.items():
            for service, ordered in names.items():
                Drains(connection.client, ServiceKeys(service, target.prefix)).lift(ordered)
            click.echo(f"{place}: workers of {', '.join(names)} may start again")


def _order(order: Order, places: Sequence[str], url: str | None, prefix: str | None, timeout_s: float | None) -> None:
    target = find_server(url, prefix)
    with connect(target.url) as connection, translated(connection.safe_url):
        inspector = Inspector(connection, target.prefix)
        views = inspector.services()
        subjects = [subject for place in dict.fromkeys(places) for subject in find_subjects(views, place)]
        for subject in subjects:
            Drains(connection.client, ServiceKeys(subject.service, target.prefix)).give([subject.place], order)
        for line in describe(order, subjects, views):
            click.echo(line)
        if timeout_s is not None:
            _await_end(inspector, subjects, timeout_s)
            click.echo(f"done: no worker starts there until `millstream worker start {' '.join(places)}`")


def find_subjects(views: Sequence[ServiceView], place: str) -> list[Subject]:
    """Returns in which services `place` names a live worker, or a host with a live worker or supervisor.

    Raises InvalidRequest with the names that exist if there is none.
    """
    found = [subject for view in views for subject in _subjects(view, place)]
    if found:
        return found
    workers = [worker for view in views for worker in view.workers]
    hosts = dict.fromkeys([*(worker.host for worker in workers), *(host for view in views for host in _hosts(view))])
    raise _unknown(f"no live worker or host {place!r}", place, [*hosts, *(each.consumer for each in workers)])


def _subjects(view: ServiceView, place: str) -> Iterator[Subject]:
    consumers = frozenset(worker.consumer for worker in view.workers if place in (worker.consumer, worker.host))
    if consumers or place in _hosts(view):
        yield Subject(view.name, place, consumers)


def _hosts(view: ServiceView) -> Collection[str]:
    return {each.state.host for each in view.supervisors if each.lives}


def find_orders(views: Sequence[ServiceView], place: str) -> Mapping[str, Sequence[str]]:
    """Returns the names under which `place`, a worker or a host, is kept empty, by service.

    Raises InvalidRequest with the names that are if there is none.
    """
    found = {view.name: [name for name in view.drained if is_on(place, name)] for view in views}
    found = {service: names for service, names in found.items() if names}
    if not found:
        ordered = [name for view in views for name in view.drained]
        raise _unknown(f"{place!r} was not drained or stopped", place, ordered)
    return found


def _unknown(what: str, name: str, known: Sequence[str]) -> InvalidRequest:
    names = list(dict.fromkeys(each for each in known if each))
    close = did_you_mean(name, names)
    listed = f"{', '.join(names[:_MOST_NAMED])}{', ...' if len(names) > _MOST_NAMED else ''}" or "none"
    return InvalidRequest(what, hint=f"did you mean {close}? there are: {listed}" if close else f"there are: {listed}")


def describe(order: Order, subjects: Sequence[Subject], views: Sequence[ServiceView]) -> Iterator[str]:
    """Yields a line for each subject, and a warning for each service that has no other ready worker."""
    verbs: dict[Order, str] = {"drain": "draining", "stop": "stopping"}
    for subject in subjects:
        yield f"{subject.place}: {verbs[order]} {quantity(len(subject.consumers), 'worker')} of {subject.service}"
    for view in views:
        ending = {name for subject in subjects if subject.service == view.name for name in subject.consumers}
        ready = {worker.consumer for worker in view.workers if worker.state == "ready"}
        if ending and not ready - ending:
            yield f"warning: service {view.name} has no other ready worker: its jobs will wait"


def _await_end(inspector: Inspector, subjects: Sequence[Subject], timeout_s: float) -> None:
    """Waits until none of the subjects' workers lives, nor any that had started meanwhile. Raises DeadlineExceeded."""
    deadline = time.monotonic() + timeout_s
    names = sorted({subject.service for subject in subjects})
    places = {subject.place for subject in subjects}
    while running := _running(inspector.services(names), places):
        if time.monotonic() >= deadline:
            raise DeadlineExceeded(
                f"{', '.join(sorted(running))} still running after {timeout_s:g} s; the order stays",
                hint="wait longer with --timeout, or see `millstream worker ls`",
            )
        time.sleep(_POLL_S)


def _running(views: Sequence[ServiceView], places: Collection[str]) -> set[str]:
    workers = [worker for view in views for worker in view.workers]
    return {worker.consumer for worker in workers if worker.consumer in places or worker.host in places}
