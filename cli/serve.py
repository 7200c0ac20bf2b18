"""`millstream serve`: serves the HTTP API in front of the queue."""

from __future__ import annotations

import os
from pathlib import Path

import click

from millstream.broker.config.telemetry import LogFormat, LogLevel
from millstream.broker.target import find_telemetry
from millstream.cli import options
from millstream.cli.extras import check_installed
from millstream.cli.interrupts import Interrupts
from millstream.cli.server import find_server
from millstream.gateway.addresses import in_url
from millstream.gateway.api.settings import MAX_BODY, MAX_PENDING, Settings, check_address

PORT = 8080


@click.command()
@options.url
@options.prefix
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any free port.")
@click.option(
    "--keys",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of API keys; needed to listen on an address that other hosts reach.",
)
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes on the port.")
@click.option(
    "--max-pending",
    type=click.IntRange(min=0),
    default=MAX_PENDING,
    show_default=True,
    help="Calls that a process holds while the queue's server is away; others get 503.",
)
@click.option(
    "--max-body", type=click.IntRange(min=1024), default=MAX_BODY, show_default=True, help="Bytes of a request at most."
)
@click.option(
    "--allowed-host", "allowed_hosts", metavar="NAME", multiple=True, help="Accept this name, such as a proxy's."
)
@click.option("--allow-origin", "origins", metavar="ORIGIN", multiple=True, help="Web pages of this origin may call.")
@options.drain_timeout
@options.log_format
@options.log_level
def serve(
    url: str | None,
    prefix: str | None,
    host: str,
    port: int,
    keys: Path | None,
    processes: int,
    max_pending: int,
    max_body: int,
    allowed_hosts: tuple[str, ...],
    origins: tuple[str, ...],
    drain_s: float,
    log_format: LogFormat | None,
    log_level: LogLevel | None,
) -> None:
    """Serve an HTTP API in front of the queue: that of OpenAI, Cohere, Jina and TEI, and one for every service.

    The first Ctrl-C or SIGTERM ends it after the open requests, a second one at once. docs/http.md has all routes.
    """
    check_installed("gateway", "fastapi", "orjson", "uvicorn")
    hosts = check_address(host, keys is not None, allowed_hosts)
    telemetry = options.set_up_logs(find_telemetry(os.environ), log_format, log_level)
    target = find_server(url, prefix)
    settings = Settings(
        target.url, target.prefix, keys, hosts, origins, max_body=max_body, max_pending=max_pending, drain_s=drain_s
    )
    from millstream.gateway.api.server import ApiServer, serve_processes
    from millstream.gateway.web_server import listen

    with listen(host, port) as listening:
        shown = f"http://{in_url(host)}:{listening.getsockname()[1]}"
        if processes > 1:
            click.echo(f"serving: {shown} with {processes} processes")
            serve_processes(settings, telemetry, listening, processes)
            return
        with Interrupts() as interrupts:
            server = ApiServer(settings)
            interrupts.attach(server)
            click.echo(f"serving: {shown}")
            server.serve_on(listening)
