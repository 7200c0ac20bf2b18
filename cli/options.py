"""Options that several commands share."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from millstream.broker.config.telemetry import LogFormat, LogLevel, TelemetrySettings
from millstream.broker.config.units import seconds
from millstream.broker.contract.errors import InvalidRequest
from millstream.cli.completion import complete_services
from millstream.telemetry import logs, traces

Command = TypeVar("Command", bound=Callable[..., Any])

url = click.option(
    "--url",
    metavar="URL",
    help="The Redis server; by default MILLSTREAM_REDIS_URL, redis.url of ./config.yaml, or a local `millstream up`.",
)
prefix = click.option(
    "--prefix", metavar="PREFIX", help="Start of every key; by default redis.key_prefix of ./config.yaml, or else ms."
)

allow_eviction = click.option(
    "--allow-eviction", is_flag=True, help="Use a server that deletes keys when its memory is full: jobs may be lost."
)

service = click.argument("service", shell_complete=complete_services)
services = click.argument("services", metavar="[SERVICE]...", nargs=-1, shell_complete=complete_services)
yes = click.option("--yes", is_flag=True, help="Do not ask.")


def json_output(contents: str = "") -> Callable[[Command], Command]:
    """Returns the option `--json` of a command that shows something. `contents` ends the sentence of its help."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print JSON{contents}.")


def duration(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Returns the seconds of an option such as 500ms, 10s, 5m or 2h, for `callback=`.

    Raises BadParameter if the value is no duration or is 0.
    """
    if value is None:
        return None
    try:
        parsed = seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if not parsed:
        raise click.BadParameter("must be above 0")
    return parsed


def wait_timeout(text: str) -> Callable[[Command], Command]:
    """Returns the option `--timeout` of a command that waits for workers, with the help `text`."""
    return click.option(
        "--timeout",
        "timeout_s",
        metavar="TIME",
        callback=duration,
        default="60s",
        show_default=True,
        help=text,
    )


log_format = click.option(
    "--log-format",
    type=click.Choice(get_args(LogFormat)),
    help="Log lines on standard error: text or JSON; by default telemetry.log_format.",
)
log_level = click.option(
    "--log-level",
    type=click.Choice(get_args(LogLevel)),
    help="Least level of log messages; by default telemetry.log_level. debug has a line for each batch.",
)


def set_up_logs(
    settings: TelemetrySettings, log_format: LogFormat | None, log_level: LogLevel | None
) -> TelemetrySettings:
    """Makes this command log as its options say, else as `settings` do. Returns the settings of its processes.

    Raises ConfigError if traces are on and OpenTelemetry is not installed.
    """
    chosen = settings.under(os.environ).with_options(log_format, log_level)
    logs.set_up(chosen)
    traces.check(chosen.traces)
    return chosen


drain_timeout = click.option(
    "--drain-timeout",
    "drain_s",
    metavar="TIME",
    callback=duration,
    default="30s",
    show_default=True,
    help="Longest drain; what still runs then is given back to the queue.",
)


def confirm(question: str, yes: bool) -> None:
    """Asks on the terminal, unless `yes`. Raises InvalidRequest if there is no terminal, Abort if the answer is no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(question, hint="there is no terminal to answer on: say --yes")
    click.confirm(question, abort=True)


class SecondsRange(click.FloatRange):
    """A range of seconds that refuses NaN, which FloatRange accepts in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds
