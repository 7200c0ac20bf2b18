"""Serves the HTTP API: in this process, or in several processes behind one socket."""

from __future__ import annotations

import functools
import socket

import uvicorn
from starlette.types import ASGIApp

from millstream.broker.config.telemetry import TelemetrySettings
from millstream.gateway.api.app import make_app
from millstream.gateway.api.keys import read_keys
from millstream.gateway.api.settings import Settings
from millstream.gateway.api.state import Gateway
from millstream.gateway.web_server import WebServer
from millstream.telemetry import logs

KEEP_ALIVE_S = 75
"""Seconds for which an idle connection stays open: longer than the 60 s of common load balancers, so that none of them
sends a request on a connection that is being closed."""


class ApiServer(WebServer):
    """The API's web server in this process."""

    def __init__(self, settings: Settings) -> None:
        self.gateway = Gateway(settings)
        super().__init__(_config(settings, make_app(self.gateway)))


def serve_processes(settings: Settings, telemetry: TelemetrySettings, listening: socket.socket, processes: int) -> None:
    """Serves on a socket with several processes, until SIGINT or SIGTERM. One that dies is started again."""
    if settings.keys:
        # A process that cannot read them would be started again and again.
        read_keys(settings.keys)
    from uvicorn.supervisors import Multiprocess

    config = _config(settings, functools.partial(_make_app, settings, telemetry), processes)
    Multiprocess(config, sockets=[listening]).run()


def _make_app(settings: Settings, telemetry: TelemetrySettings) -> ASGIApp:
    """Returns the application of a new process, which logs as its parent does."""
    logs.set_up(telemetry)
    return make_app(Gateway(settings))


def _config(settings: Settings, app: object, processes: int | None = None) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        factory=processes is not None,
        workers=processes,
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=True,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
