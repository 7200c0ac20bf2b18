"""A local server: starts one on a data dir, or adopts the one that already serves it, and stops it without loss.

The server inherits the locked descriptor of its data dir. So the lock lasts exactly as long as the server runs, even
if the process that started it ends first.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from millstream.broker.contract.errors import BrokerUnavailable, ConfigError
from millstream.broker.server.datadir import (
    AppendFsync,
    Record,
    ping,
    prepare,
    read_record,
    try_lock,
    write_record,
)
from millstream.broker.server.engine import EngineName, Version
from millstream.broker.server.launch import Settings, failure, plan, rotate, spawn, tail

_ADOPT_S = 5.0
"""Longest wait, in seconds, for the server that holds the lock to answer."""

_READY_S = 60.0
"""Longest wait, in seconds, for a server to load its data."""

_POLL_S = 0.01


def running(data_dir: Path) -> str | None:
    """Returns the URL of the server that runs on `data_dir`, even if it is still loading; None if there is none."""
    record = read_record(data_dir)
    if record is None or ping(record.socket) not in ("up", "loading"):
        return None
    return _unix_url(record.socket)


class EmbeddedServer:
    """A handle on a local server. stop() ends the server only if this handle started it, that is, if it is `owned`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._record: Record
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls,
        data_dir: Path,
        *,
        binary: Path | None = None,
        tcp_port: int | None = None,
        appendfsync: AppendFsync = "everysec",
        maxmemory: int | None = None,
    ) -> EmbeddedServer:
        """Returns a server that answers on `data_dir`: the one that already runs there, or a new one.

        `tcp_port` None: Unix socket only; 0: any free port. `maxmemory` is in bytes. Raises ConfigError if no binary
        can read the data or a setting cannot work, BrokerUnavailable if the server does not start; both quote the end
        of its log.
        """
        server = cls(Settings(data_dir, binary, tcp_port, appendfsync, maxmemory))
        server._open()
        return server

    @property
    def url(self) -> str:
        return _unix_url(self._record.socket)

    @property
    def tcp_url(self) -> str | None:
        port = self._record.tcp_port
        return f"redis://127.0.0.1:{port}" if port else None

    @property
    def pid(self) -> int:
        """Process id of the server; 0 if its launcher died before it could record it."""
        return self._record.pid

    @property
    def engine(self) -> EngineName:
        return self._record.engine

    @property
    def version(self) -> Version:
        return self._record.version

    @property
    def data_dir(self) -> Path:
        return self._settings.data_dir

    @property
    def owned(self) -> bool:
        """Whether this handle started the server, so that stop() ends it."""
        return self._process is not None

    def alive(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        return ping(self._record.socket) != "absent"

    def restart(self) -> None:
        """Starts again on the same data, address and settings, after a crash or to change to a new binary."""
        self.stop()
        self._open()

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the server if this handle owns it: SIGTERM, at which it saves its data; SIGKILL after `timeout` s."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._tidy()

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _open(self) -> None:
        try:
            self._settings = replace(self._settings, data_dir=prepare(self._settings.data_dir))
            self._start_or_adopt()
        except OSError as error:
            raise ConfigError(
                f"cannot use the data dir {self.data_dir}: {error}", hint="set MILLSTREAM_DATA_DIR to a writable folder"
            ) from error

    def _start_or_adopt(self) -> None:
        """Starts the server if this process gets the lock. Otherwise waits for the holder's server to answer.

        Raises BrokerUnavailable if that server does not answer within _ADOPT_S seconds.
        """
        deadline = time.monotonic() + _ADOPT_S
        while (lock := try_lock(self.data_dir)) is None:
            if self._adopt():
                return
            if time.monotonic() > deadline:
                raise self._unresponsive()
            time.sleep(_POLL_S)
        try:
            # A free lock does not prove that no server runs: the lock file may have been deleted.
            if not self._adopt():
                self._launch(lock)
        finally:
            os.close(lock)

    def _adopt(self) -> bool:
        """Adopts the server of the record and waits until it is ready. Returns False if it does not answer.

        Raises ConfigError if it runs with settings that conflict with ours.
        """
        record = read_record(self.data_dir)
        if record is None or ping(record.socket) not in ("up", "loading"):
            return False
        if conflict := self._settings.conflict(record):
            raise ConfigError(f"the server of {self.data_dir} already runs with {conflict}", hint="stop it first")
        self._record = record
        ready = self._wait_until_ready()
        # The launcher may have recorded the process id while we waited.
        self._record = read_record(self.data_dir) or record
        return ready

    def _launch(self, lock: int) -> None:
        before = read_record(self.data_dir)
        if before is not None and ping(before.socket) == "silent":
            raise self._unresponsive()
        self._record = plan(self._settings)
        # A restart uses the same port, because clients reconnect to it.
        self._settings = replace(self._settings, tcp_port=self._record.tcp_port or None)
        write_record(self.data_dir, self._record)
        log = self.data_dir / "server.log"
        seen = rotate(log)
        self._process = spawn(self._record, self.data_dir, log, lock)
        self._record = replace(self._record, pid=self._process.pid)
        write_record(self.data_dir, self._record)
        try:
            ready = self._wait_until_ready()
        except KeyboardInterrupt:
            self.stop()
            raise
        if not ready:
            self._process = None
            write_record(self.data_dir, before)
            _remove_socket(self._record.socket)
            raise failure(self.data_dir, tail(log, seen))

    def _wait_until_ready(self) -> bool:
        """Waits while the server loads its data. Returns False if it ended.

        Raises BrokerUnavailable if it is not ready after _READY_S seconds.
        """
        deadline = time.monotonic() + _READY_S
        while ping(self._record.socket) != "up":
            if not self.alive():
                return False
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f"the server of {self.data_dir} (pid {self.pid}) is not ready after {_READY_S:.0f} s",
                    hint="it is still loading its data: start again to wait for it",
                )
            time.sleep(_POLL_S)
        return True

    def _unresponsive(self) -> BrokerUnavailable:
        record = read_record(self.data_dir)
        holder = record.pid if record and record.pid else "unknown"
        return BrokerUnavailable(
            f"the data dir {self.data_dir} is held by a server that does not answer (pid {holder})",
            hint=f"see {self.data_dir / 'server.log'}; end that process, then start again",
        )

    def _tidy(self) -> None:
        """Removes the ended server's process id and socket, unless another process has started a server since."""
        lock = try_lock(self.data_dir)
        if lock is None:
            return
        try:
            write_record(self.data_dir, replace(self._record, pid=0))
            _remove_socket(self._record.socket)
        finally:
            os.close(lock)


def _remove_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    with suppress(OSError):
        path.parent.rmdir()


def _unix_url(path: Path) -> str:
    return f"unix://{quote(os.fspath(path))}"
