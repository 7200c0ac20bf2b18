"""`millstream top`: shows services, priorities, workers, batches and latencies, and keeps them up to date."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime

import click

from millstream.broker.contract.errors import BrokerUnavailable
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.metrics import Metrics
from millstream.broker.queue.pace import Look, Pace, Paces
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection
from millstream.cli import options
from millstream.cli.screen import Screen, can_draw
from millstream.cli.server import connect, find_server
from millstream.cli.table import age, terminal_width
from millstream.cli.top_frame import Picture, frame, record

_TICK_S = 0.1
"""Longest wait for a key, in seconds: so a new look, and a terminal of another size, are shown soon."""

_SILENT_S = 2.0
"""Seconds beyond the interval after which a look that has not returned is said to be late."""


@click.command()
@options.services
@options.url
@options.prefix
@click.option(
    "--interval",
    "interval_s",
    metavar="TIME",
    callback=options.duration,
    default="1s",
    show_default=True,
    help="Time between two looks.",
)
@click.option("--once", is_flag=True, help="Print one picture, from two looks, and end; also if there is no terminal.")
@options.json_output(" once, with the figures of `queue ls` and the latencies")
def top(
    services: tuple[str, ...], url: str | None, prefix: str | None, interval_s: float, once: bool, as_json: bool
) -> None:
    """Show SERVICE, or all services, with priorities, workers, batches and latencies, until q or Ctrl-C.

    WAITING jobs wait for a worker, HELD ones are claimed. OLDEST is the age of the oldest job. BACKLOG is the time in
    which the live workers would answer all waiting jobs. WAIT is the time from acceptance to the first forward, and
    TOTAL the time to the answer; P50 and P95 are the times that half and 95 % of the jobs did not exceed. A priority is
    shown if it has jobs. A narrow terminal leaves columns out. If the server is lost, top says so, and goes on when it
    is back.
    """
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        looker = Looker(connection, target.prefix, services)
        # The first look raises the errors of wrong names and of a server that cannot be reached.
        first = looker.look()
        if as_json or once or not can_draw():
            _print_once(looker, interval_s, as_json)
        else:
            with suppress(KeyboardInterrupt):
                run(looker, interval_s, first)


class Looker:
    """Looks at services over one connection, and measures their pace between looks."""

    def __init__(self, connection: Connection, prefix: str, services: Sequence[str]) -> None:
        self.server = connection.safe_url
        self._registry = Registry(connection, prefix)
        self._inspector = Inspector(connection, prefix)
        self._metrics = Metrics(connection, prefix)
        self._services = services
        self._paces = Paces()
        for name in services:
            # Raises UnknownService with the name that was probably meant.
            self._registry.read(name)

    def look(self) -> Picture:
        """Looks once. Raises BrokerUnavailable."""
        names = list(self._services) or self._registry.names()
        look = Look(time.monotonic(), self._inspector.services(names), self._metrics.services(names))
        paces: Mapping[str, Pace] = self._paces.add(look)
        return Picture(look, paces, self.server, f"{datetime.now().astimezone():%H:%M:%S}")

    def forget(self) -> None:
        self._paces.forget()


def _print_once(looker: Looker, interval_s: float, as_json: bool) -> None:
    time.sleep(interval_s)
    picture = looker.look()
    if as_json:
        click.echo(json.dumps(record(picture), ensure_ascii=False, indent=2))
    else:
        click.echo("\n".join(frame(picture, terminal_width())))


@dataclass(frozen=True, slots=True)
class State:
    """The newest picture, when it was looked at (monotonic seconds), and the error of later looks, "" if none."""

    picture: Picture
    at: float
    error: str = ""


class Looks(threading.Thread):
    """Looks every `interval_s` seconds. In a thread, since a server that does not answer must not block the keys."""

    def __init__(self, looker: Looker, interval_s: float, first: Picture, now: Callable[[], float]) -> None:
        super().__init__(name="looks", daemon=True)
        self._looker = looker
        self._interval_s = interval_s
        self._now = now
        self._ended = threading.Event()
        self.state = State(first, now())
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self._ended.wait(self._interval_s):
                self._look()
        except Exception as error:  # noqa: BLE001 - the main thread raises it, after the terminal is restored
            self.failure = error

    def _look(self) -> None:
        try:
            self.state = State(self._looker.look(), self._now())
        except BrokerUnavailable as error:
            self._looker.forget()
            self.state = replace(self.state, error=str(error))

    def end(self) -> None:
        self._ended.set()


def run(looker: Looker, interval_s: float, first: Picture) -> None:
    """Draws until the key q. Raises what the looks raise, but for a server that is lost."""
    looks = Looks(looker, interval_s, first, time.monotonic)
    looks.start()
    drawn: tuple[object, ...] = ()
    with Screen() as screen:
        while True:
            if looks.failure:
                raise looks.failure
            state, (columns, lines) = looks.state, screen.size
            trouble = describe_trouble(state, time.monotonic(), interval_s)
            if drawn != (state, columns, lines, trouble):
                drawn = (state, columns, lines, trouble)
                # A terminal may wrap behind a character in its last column.
                screen.draw(frame(replace(state.picture, trouble=trouble), columns - 1, lines))
            if screen.read_key(_TICK_S) in ("q", "Q"):
                break
    looks.end()


def describe_trouble(state: State, now: float, interval_s: float) -> str:
    """Returns the line that says that the server is lost or silent, "" if it answers."""
    silent_s = now - state.at
    if state.error:
        return f"SERVER LOST for {age(int(silent_s) * 1000)}, figures of then: {state.error}"
    if silent_s > interval_s + _SILENT_S:
        return f"the server has not answered for {int(silent_s)} s"
    return ""
