"""Serves the dashboard until it is stopped: runs the web server and the watcher."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import uvicorn

from millstream.broker.transport.connection import Connection
from millstream.gateway.dashboard.app import make_app
from millstream.gateway.dashboard.looks import Watcher, see
from millstream.gateway.dashboard.rendering import Renderer
from millstream.gateway.dashboard.settings import Settings
from millstream.gateway.dashboard.sign_in import SignIn
from millstream.gateway.dashboard.state import Dashboard
from millstream.gateway.dashboard.users import User
from millstream.gateway.web_server import WebServer

END_S = 3
"""Seconds that open requests get when the server is stopped."""


class Server(WebServer):
    """The dashboard's web server."""

    def __init__(
        self, connection: Connection, prefix: str, settings: Settings, users: Mapping[str, User] | None
    ) -> None:
        self._watcher = Watcher(lambda: see(connection, prefix))
        dashboard = Dashboard(
            connection, prefix, settings, self._watcher, Renderer(connection.safe_url, settings.root_path)
        )
        app = make_app(dashboard, None if users is None else SignIn(users))
        # proxy_headers: only a proxy on this host is believed when it says that the browser came by https.
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=True,
            timeout_graceful_shutdown=END_S,
        )
        super().__init__(config)

    def serve_on(self, listening: socket.socket) -> None:
        """Serves on a socket until `stop` or `kill`."""
        self._watcher.start()
        try:
            super().serve_on(listening)
        finally:
            self._watcher.end()
