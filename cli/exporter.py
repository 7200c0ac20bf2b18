"""`millstream exporter`: serves the metrics of all services to Prometheus."""

from __future__ import annotations

import os
import threading

import click

from millstream.broker.config.telemetry import LogFormat, LogLevel
from millstream.broker.contract.errors import ConfigError
from millstream.broker.target import find_telemetry
from millstream.cli import options
from millstream.cli.interrupts import Interrupts
from millstream.cli.server import connect, find_server
from millstream.telemetry.readings import reader

PORT = 9478


class _End:
    """The end of the exporter, as interrupts ask for it."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def wait(self) -> None:
        self._asked.wait()

    def stop(self) -> None:
        self._asked.set()

    kill = stop


@click.command()
@options.url
@options.prefix
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all of them.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0 for any free port.")
@options.log_format
@options.log_level
def exporter(
    url: str | None,
    prefix: str | None,
    host: str,
    port: int,
    log_format: LogFormat | None,
    log_level: LogLevel | None,
) -> None:
    """Serve the metrics of all services to Prometheus, at /metrics, until Ctrl-C or SIGTERM.

    docs/reference/metrics.md lists them. While the server is away they are `millstream_up 0`. They have names of
    services, and neither payloads nor ids; anybody who reaches the port can read them. Needs the extra `metrics`.
    """
    try:
        from millstream.telemetry.exporter import serve
    except ImportError as error:
        raise ConfigError(
            f"the exporter needs prometheus_client, which cannot be imported: {error}",
            hint='pip install "millstream[metrics]"',
        ) from error
    options.set_up_logs(find_telemetry(os.environ), log_format, log_level)
    target = find_server(url, prefix)
    end = _End()
    with Interrupts() as interrupts, connect(target.url) as connection:
        used, stop = serve(reader(connection, target.prefix), host, port)
        click.echo(f"metrics of {connection.safe_url}: http://{_in_url(host)}:{used}/metrics", err=True)
        interrupts.attach(end)
        end.wait()
        stop()


def _in_url(host: str) -> str:
    """Returns `host` as a URL has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host
