"""Launching the embedded server: its settings, its flags, its log, and what a failed start means."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from millstream.broker.contract.errors import BrokerUnavailable, ConfigError, MillstreamError
from millstream.broker.server.datadir import AppendFsync, Record, last_writer, socket_path
from millstream.broker.server.engine import find_engine
from millstream.broker.server.ownership import open_private

_LOG_BYTES = 1 << 20

_FAILURES: tuple[tuple[str, type[MillstreamError], str], ...] = (
    ("Address already in use", ConfigError, "choose another TCP port"),
    ("No space left", BrokerUnavailable, "free disk space, or choose another data dir"),
    ("Permission denied|Read-only file system", ConfigError, "make the data dir writable, or choose another"),
    ("handle RDB format", ConfigError, "the data is from a newer server: install that one, or choose another data dir"),
    (
        "Bad file format|Unexpected end of file|AOF file|append only file|checksum",
        ConfigError,
        "the data is damaged: copy the data dir, then repair it with redis-check-aof --fix, or choose another",
    ),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run the server. `tcp_port` None: Unix socket only; 0: any free port. `maxmemory` is in bytes."""

    data_dir: Path
    binary: Path | None
    tcp_port: int | None
    appendfsync: AppendFsync
    maxmemory: int | None

    def conflict(self, running: Record) -> str:
        """Which wish a running server does not meet, or an empty string. One stricter about the disk meets it."""
        if self.tcp_port is not None and (not running.tcp_port or self.tcp_port not in (0, running.tcp_port)):
            return f"tcp_port {running.tcp_port or 'off'}, not {self.tcp_port or 'any'}"
        if self.appendfsync == "always" and running.appendfsync != "always":
            return f"appendfsync {running.appendfsync}, not always"
        if self.maxmemory is not None and self.maxmemory != running.maxmemory:
            return f"maxmemory {running.maxmemory or 'off'}, not {self.maxmemory}"
        return ""


def plan(wish: Settings) -> Record:
    """The server to be started, as it will be recorded."""
    engine = find_engine(wish.binary, last_writer(wish.data_dir))
    return Record(
        engine=engine.name,
        version=engine.version,
        binary=engine.binary,
        socket=socket_path(wish.data_dir, os.environ),
        pid=0,
        tcp_port=_free_port() if wish.tcp_port == 0 else wish.tcp_port or 0,
        appendfsync=wish.appendfsync,
        maxmemory=wish.maxmemory or 0,
    )


def spawn(record: Record, data_dir: Path, log: Path, lock: int) -> subprocess.Popen[bytes]:
    options: dict[str, object] = {
        "dir": data_dir,
        "unixsocket": record.socket,
        "unixsocketperm": "700",
        "port": record.tcp_port,
        "bind": "127.0.0.1",
        "appendonly": "yes",
        "appendfsync": record.appendfsync,
        "save": "",
        "maxmemory": record.maxmemory,
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with os.fdopen(open_private(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as sink:
        return subprocess.Popen(
            [record.binary, *flags],
            stdin=subprocess.DEVNULL,
            stdout=sink,  # also what it says before it reads its flags, which a log file of its own would miss
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C in the terminal is for the launcher
            umask=0o077,
        )


def rotate(log: Path) -> int:
    """Put a long log aside; the bytes that are left."""
    size = log.stat().st_size if log.exists() else 0
    if size <= _LOG_BYTES:
        return size
    log.replace(log.with_suffix(".log.old"))
    return 0


def tail(log: Path, seen: int) -> str:
    """The last lines written after the first `seen` bytes, without process id and date."""
    with log.open("rb") as file:
        file.seek(seen)
        lines = file.read().decode(errors="replace").splitlines()
    said = [re.sub(r"^\d+:\w \d+ \w+ \d+ [\d:.]+ . ", "", line).strip() for line in lines]
    return "; ".join([line for line in said if line][-3:])


def failure(data_dir: Path, said: str) -> MillstreamError:
    """Why the server did not start, with what to do about it."""
    message = f"the server of {data_dir} did not start: {said or 'it left no message'}"
    for pattern, kind, hint in _FAILURES:
        if re.search(pattern, said, re.IGNORECASE):
            return kind(message, hint=hint)
    return BrokerUnavailable(message, hint=f"see {data_dir / 'server.log'}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
