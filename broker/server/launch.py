"""Launches the embedded server: its settings, its flags, its log, and the error for a failed start."""

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
"""Size, in bytes, above which the log is rotated at a start."""

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
    """The settings of a server. `tcp_port` None: Unix socket only; 0: any free port. `maxmemory` is in bytes."""

    data_dir: Path
    binary: Path | None
    tcp_port: int | None
    appendfsync: AppendFsync
    maxmemory: int | None

    def conflict(self, running: Record) -> str:
        """Returns the first setting in which a running server conflicts with this one, or an empty string.

        A running server with appendfsync always also satisfies everysec.
        """
        if self.tcp_port is not None and (not running.tcp_port or self.tcp_port not in (0, running.tcp_port)):
            return f"tcp_port {running.tcp_port or 'off'}, not {self.tcp_port or 'any'}"
        if self.appendfsync == "always" and running.appendfsync != "always":
            return f"appendfsync {running.appendfsync}, not always"
        if self.maxmemory is not None and self.maxmemory != running.maxmemory:
            return f"maxmemory {running.maxmemory or 'off'}, not {self.maxmemory}"
        return ""


def plan(settings: Settings) -> Record:
    """Returns the record of the server to start. Raises ConfigError if no engine can serve the data dir."""
    engine = find_engine(settings.binary, last_writer(settings.data_dir))
    return Record(
        engine=engine.name,
        version=engine.version,
        binary=engine.binary,
        socket=socket_path(settings.data_dir, os.environ),
        pid=0,
        tcp_port=_free_port() if settings.tcp_port == 0 else settings.tcp_port or 0,
        appendfsync=settings.appendfsync,
        maxmemory=settings.maxmemory or 0,
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
            stdout=sink,  # includes output from before it reads its flags, which the option logfile would miss
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C in the terminal must reach only the launcher
            umask=0o077,
        )


def rotate(log: Path) -> int:
    """Renames a log of more than _LOG_BYTES to *.log.old. Returns the bytes in the log after that."""
    size = log.stat().st_size if log.exists() else 0
    if size <= _LOG_BYTES:
        return size
    log.replace(log.with_suffix(".log.old"))
    return 0


def tail(log: Path, seen: int) -> str:
    """Returns the last three lines after the first `seen` bytes, without process id and date, joined by "; "."""
    with log.open("rb") as file:
        file.seek(seen)
        lines = file.read().decode(errors="replace").splitlines()
    messages = [re.sub(r"^\d+:\w \d+ \w+ \d+ [\d:.]+ . ", "", line).strip() for line in lines]
    return "; ".join([message for message in messages if message][-3:])


def failure(data_dir: Path, log_end: str) -> MillstreamError:
    """Returns the error for a server that did not start, with a hint that matches the end of its log."""
    message = f"the server of {data_dir} did not start: {log_end or 'its log has no message'}"
    for pattern, kind, hint in _FAILURES:
        if re.search(pattern, log_end, re.IGNORECASE):
            return kind(message, hint=hint)
    return BrokerUnavailable(message, hint=f"see {data_dir / 'server.log'}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
