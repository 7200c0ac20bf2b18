"""`millstream dashboard`: serves the web dashboard."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from millstream.broker.config.telemetry import LogFormat, LogLevel
from millstream.broker.target import find_telemetry
from millstream.cli import options
from millstream.cli.extras import check_installed
from millstream.cli.interrupts import Interrupts
from millstream.cli.server import connect, find_server

PORT = 8870


@click.command()
@options.url
@options.prefix
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any free port.")
@click.option(
    "--password-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Users, a line each; needed to listen on an address that other hosts reach.",
)
@click.option("--new-user", metavar="NAME:ROLE", help="Ask for a password, print the line for that file, and end.")
@click.option("--read-only", is_flag=True, help="No buttons and no actions, for all users.")
@click.option("--root-path", metavar="PATH", default="", help="Path under which a proxy shows it, such as /queues.")
@click.option(
    "--allowed-host", "allowed_hosts", metavar="NAME", multiple=True, help="Accept this name, such as a proxy's."
)
@options.log_format
@options.log_level
def dashboard(
    url: str | None,
    prefix: str | None,
    host: str,
    port: int,
    password_file: Path | None,
    new_user: str | None,
    read_only: bool,
    root_path: str,
    allowed_hosts: tuple[str, ...],
    log_format: LogFormat | None,
    log_level: LogLevel | None,
) -> None:
    """Serve a web page on the queues: services, batches, workers, dead letters, and what is wrong with them.

    Users of the role viewer look; operators may pause and resume services, and run dead letters again or remove them.
    Without --password-file everybody on this host is an operator.
    """
    check_installed("dashboard", "fastapi", "jinja2", "uvicorn")
    from millstream.gateway.dashboard.settings import make_settings
    from millstream.gateway.dashboard.users import new_line, read_users

    if new_user is not None:
        name, _, role = new_user.rpartition(":")
        click.echo(new_line(name, role, _ask_password(name)))
        return
    options.set_up_logs(find_telemetry(os.environ), log_format, log_level)
    users = read_users(password_file) if password_file else None
    settings = make_settings(
        host, has_users=users is not None, root_path=root_path, allowed_hosts=allowed_hosts, read_only=read_only
    )
    target = find_server(url, prefix)
    from millstream.gateway.addresses import in_url
    from millstream.gateway.dashboard.server import Server
    from millstream.gateway.web_server import listen

    with connect(target.url) as connection, listen(host, port) as listening, Interrupts() as interrupts:
        server = Server(connection, target.prefix, settings, users)
        interrupts.attach(server)
        click.echo(f"dashboard: http://{in_url(host)}:{listening.getsockname()[1]}{settings.root_path}/")
        server.serve_on(listening)


def _ask_password(name: str) -> str:
    if sys.stdin.isatty():
        password: str = click.prompt(f"password of {name}", hide_input=True, confirmation_prompt=True, err=True)
        return password
    return sys.stdin.readline().rstrip("\n")
