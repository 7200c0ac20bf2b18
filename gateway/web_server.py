"""The web server of a command: a socket that is opened first, and a server that its caller stops."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator

import uvicorn

from millstream.broker.contract.errors import ConfigError


class WebServer(uvicorn.Server):
    """A web server that its caller stops. It handles no signals."""

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
        self.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on the first address of `host`. Raises ConfigError if that is not possible."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another --port") from None
