"""The embedded server's data dir: its record, its lock, and the short folder for its socket."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from millstream.broker.contract.errors import ConfigError
from millstream.broker.server.engine import Engine, EngineName, Version
from millstream.broker.server.ownership import check_private, open_private

AppendFsync = Literal["everysec", "always"]
PingState = Literal["up", "loading", "silent", "absent"]

_SOCKET_BYTES = 100
"""Longest path of a socket, bytes. Unix allows 107, and Redis 6.2 runs without any socket if its path is longer."""


@dataclass(frozen=True, slots=True)
class Record:
    """engine.json: the engine that last wrote the data, and the addresses of its server.

    `pid` is 0 if it is unknown, `tcp_port` is 0 if there is none. `maxmemory` is in bytes, 0 for no limit.
    """

    engine: EngineName
    version: Version
    binary: Path
    socket: Path
    pid: int
    tcp_port: int
    appendfsync: AppendFsync
    maxmemory: int

    def writer(self) -> Engine:
        return Engine(self.engine, self.version, self.binary)


_RECORD = TypeAdapter(Record)


def prepare(data_dir: Path) -> Path:
    """Creates `data_dir` if it is missing, readable only by its owner, and returns its absolute path.

    Raises ConfigError if other users may write it, OSError if it cannot be created.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(data_dir)
    return data_dir.resolve()


def read_record(data_dir: Path) -> Record | None:
    """Returns the record, or None if none can be read. Raises ConfigError if other users may have written it."""
    try:
        check_private(data_dir)
        with os.fdopen(open_private(data_dir / "engine.json", os.O_RDONLY), "rb") as file:
            return _RECORD.validate_json(file.read())
    except (OSError, ValueError):
        return None


def write_record(data_dir: Path, record: Record | None) -> None:
    """Replaces the record atomically, so that no reader sees half of it. None removes it."""
    path = data_dir / "engine.json"
    if record is None:
        path.unlink(missing_ok=True)
        return
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(open_private(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(_RECORD.dump_json(record, indent=2))
    draft.replace(path)


def last_writer(data_dir: Path) -> Engine | None:
    """Returns the engine that last wrote the data, or None if there is no data.

    If the record is lost, the folder appendonlydir shows that the data is from Redis 7.0 or newer.
    """
    if record := read_record(data_dir):
        return record.writer()
    if (data_dir / "appendonlydir").exists():
        return Engine("redis", (7, 0, 0), Path("redis-server"))
    return None


def try_lock(data_dir: Path) -> int | None:
    """Locks the data dir. Returns None if another process holds the lock.

    Otherwise returns a descriptor; the lock lasts until its last copy is closed.
    """
    descriptor = open_private(data_dir / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def socket_path(data_dir: Path, environ: Mapping[str, str]) -> Path:
    """Returns the path of the server's socket, in a private folder that is created here.

    The path is short even if the data dir's path is long. Raises ConfigError if no folder is short and writable.
    """
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:10]
    for base in (environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"):
        path = Path(base) / f"millstream-{os.getuid()}-{digest}" / "redis.sock"
        if os.path.isabs(base) and os.access(base, os.W_OK | os.X_OK) and len(os.fsencode(path)) <= _SOCKET_BYTES:
            _make_private(path.parent)
            return path
    raise ConfigError(
        "no folder for the server's socket", hint="point XDG_RUNTIME_DIR or TMPDIR at a short, writable one"
    )


def _make_private(folder: Path) -> None:
    """Creates `folder`, or accepts it if only this user can write it. Raises ConfigError otherwise."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"{folder} is not a private folder of this user", hint="remove it, or point XDG_RUNTIME_DIR elsewhere"
        )


def ping(path: Path, timeout_s: float = 1.0) -> PingState:
    """Returns whether a server answers PING on a Unix socket within `timeout_s` seconds.

    "up": it answers, even with an error such as MISCONF, which a full disk causes. "loading": it is loading its data.
    "silent": it accepts no connection or gives no answer in time. "absent": no server listens, or it closes the
    connection.
    """
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(timeout_s)
        try:
            link.connect(os.fspath(path))
            link.sendall(b"PING\r\n")
            answer = link.recv(64)
        except (TimeoutError, BlockingIOError):
            return "silent"
        except OSError:
            return "absent"
    if answer.startswith(b"-LOADING"):
        return "loading"
    return "up" if answer else "absent"
