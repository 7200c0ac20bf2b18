"""Serves the dashboard until it is stopped: opens the socket, then runs the web server and the watcher."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator, Mapping

import uvicorn

from millstream.broker.contract.errors import ConfigError
from millstream.broker.transport.connection import Connection
from millstream.gateway.dashboard.app import make_app
from millstream.gateway.dashboard.looks import Watcher, see
from millstream.gateway.dashboard.rendering import Renderer
from millstream.gateway.dashboard.settings import Settings
from millstream.gateway.dashboard.sign_in import SignIn
from millstream.gateway.dashboard.state import Dashboard
from millstream.gateway.dashboard.users import User

END_S = 3
"""Seconds that open requests get when the server is stopped."""


class Server(uvicorn.Server):
    """A web server that its caller stops. It handles no signals."""

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

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def stop(self) -> None:
        """Ends `serve_on`, after the open requests."""
        self.should_exit = True

    def kill(self) -> None:
        """Ends `serve_on` at once."""
        self.should_exit = self.force_exit = True

    def serve_on(self, listening: socket.socket) -> None:
        """Serves on a socket until `stop` or `kill`."""
        self._watcher.start()
        try:
            self.run(sockets=[listening])
        finally:
            self._watcher.end()


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on the first address of `host`. Raises ConfigError if that is not possible."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(
            f"the dashboard cannot listen on {host}:{port}: {error.strerror}", hint="choose another --port"
        ) from None
