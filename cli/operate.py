"""`millstream queue pause`, `resume`, `purge` and `drain`: the commands that change a service's queue."""

from __future__ import annotations

import time

import click

from millstream.broker.contract.errors import DeadlineExceeded
from millstream.broker.queue import pause as pauses
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.streams import Streams
from millstream.cli import options
from millstream.cli.server import open_service
from millstream.cli.table import quantity

_POLL_S = 0.2


@click.command()
@options.service
@options.url
@options.prefix
@click.option(
    "--for", "for_s", metavar="TIME", callback=options.duration, help="Resume automatically after TIME, such as 10m."
)
@click.option("--new", "refusing", is_flag=True, help="Also refuse new jobs.")
def pause(service: str, url: str | None, prefix: str | None, for_s: float | None, refusing: bool) -> None:
    """Pause SERVICE: within a second its workers stop claiming jobs. They finish the jobs that they hold.

    New jobs are accepted and wait; their time limits keep running.
    """
    with open_service(service, url, prefix) as (connection, keys):
        pauses.pause(connection.client, keys, for_s=for_s, refusing=refusing)
    until = f"for {for_s:g} s" if for_s else f"until `millstream queue resume {service}`"
    click.echo(f"{service}: paused {until}{', refusing new jobs' if refusing else ''}")


@click.command()
@options.service
@options.url
@options.prefix
def resume(service: str, url: str | None, prefix: str | None) -> None:
    """Resume SERVICE: its workers claim jobs again."""
    with open_service(service, url, prefix) as (connection, keys):
        was_paused = pauses.resume(connection.client, keys)
    click.echo(f"{service}: {'resumed' if was_paused else 'was not paused'}")


@click.command()
@options.service
@options.url
@options.prefix
@options.yes
def purge(service: str, url: str | None, prefix: str | None, yes: bool) -> None:
    """Remove every waiting job of SERVICE. Its callers get the error that the job was cancelled.

    Jobs that workers hold continue. New jobs are still accepted: to refuse them, pause with --new first.
    """
    with open_service(service, url, prefix) as (connection, keys):
        (view,) = Inspector(connection, keys.prefix).services([service])
        options.confirm(f"Remove {quantity(view.depth, 'waiting job')} of {service}?", yes)
        ttl_ms = round(Registry(connection, keys.prefix).read(service).result_ttl * 1000)
        purged = Streams(connection.client, keys, result_ttl_ms=ttl_ms).purge()
    click.echo(f"{service}: {quantity(purged, 'job')} purged")


@click.command()
@options.service
@options.url
@options.prefix
@options.wait_timeout("Longest wait.")
def drain(service: str, url: str | None, prefix: str | None, timeout_s: float) -> None:
    """Pause SERVICE and wait until no worker holds one of its jobs. SERVICE stays paused."""
    deadline = time.monotonic() + timeout_s
    with open_service(service, url, prefix) as (connection, keys):
        before = pauses.find_pause(connection.client, keys)
        # A new pause even if it is paused already: the old one may end by itself.
        pauses.pause(connection.client, keys, refusing=before is not None and before.refusing)
        while held := Inspector(connection, keys.prefix).services([service])[0].in_flight:
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"{quantity(held, 'job')} of {service!r} still in flight after {timeout_s:g} s; it stays paused",
                    hint="wait longer with --timeout, or see `millstream worker ls`",
                )
            # If no worker is alive, nothing else returns the jobs that a lost host held.
            Lease(connection.client, keys).reclaim()
            time.sleep(_POLL_S)
    click.echo(f"{service}: drained and paused until `millstream queue resume {service}`")
