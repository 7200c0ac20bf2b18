"""Server and workers of one program: `millstream up` as a child process that ends with the program."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from millstream.broker.config.load import DEFAULT_PATH, Config, load
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    ConfigError,
    MillstreamError,
    ModelUnavailable,
    NoWorkers,
)
from millstream.broker.server.embedded import running
from millstream.broker.transport.connection import find_url
from millstream.broker.transport.error_map import START_ONE
from millstream.client.job_terms import waits_until

START_S = 300.0
"""Seconds that workers may take to be ready: a first start may have to download a model."""

_END_S = 20.0
"""Seconds that the child may take to end, before it is killed."""

_POLL_S = 0.02
"""Seconds between two checks whether the workers are ready."""

_LOG_BYTES = 64 * 1024
"""Bytes at the end of the child's output that are read."""

_PREFIX = "millstream: "
"""Start of each message of the child."""

_ERRORS: dict[int, type[MillstreamError]] = {
    error.exit_code: error for error in (ConfigError, BrokerUnavailable, ModelUnavailable)
}


class Local:
    """Running `millstream up`. Its services are on the server at `url`, under the key prefix `prefix`.

    Its standard input is a pipe without data. However this process ends, the pipe is closed, and then the child ends.
    """

    def __init__(self, config: Path, loaded: Config, data_dir: Path | None, *, replace: bool) -> None:
        self.prefix = loaded.redis.key_prefix
        self.url = ""
        self._config = config
        self._loaded = loaded
        self._data_dir = data_dir
        # Files, not pipes: a pipe that is not read would block the child.
        self._out, self._err = files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - _end closes
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "millstream.cli.main", "up", *_make_flags(data_dir, replace), "--", config],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,  # Ctrl-C is for this process
        )
        # Ends the child even if the client is not closed: at the interpreter's exit, or when it is collected.
        self._end = weakref.finalize(self, _end, self._process, files, os.getpid())
        _living.add(self)

    @classmethod
    def start(
        cls,
        config: Path | str = DEFAULT_PATH,
        *,
        data_dir: Path | str | None = None,
        replace: bool = False,
        timeout: float | None = START_S,
    ) -> Local:
        """Does as Client.local: returns when the workers of every service are ready."""
        path, folder = Path(config), None if data_dir is None else Path(data_dir).expanduser()
        loaded = load(path)
        until = waits_until(timeout)
        try:
            return cls(path, loaded, folder, replace=replace)._await_ready(until)
        except BrokerUnavailable:
            # The first try may have found the server of a program that was ending. The second starts its own.
            return cls(path, loaded, folder, replace=replace)._await_ready(until)

    def stop(self) -> None:
        """Ends the child and its processes. Does nothing in a forked process, whose parent owns the child."""
        self._end()

    def close_pipe(self) -> None:
        """Closes the inherited pipe in a forked child: while it is open, the end of the parent would not be noticed."""
        if self._process.stdin:
            self._process.stdin.close()

    def _await_ready(self, until: float | None) -> Local:
        try:
            while not self._is_ready():
                if self._process.poll() is not None:
                    raise self._make_error(self._process.returncode)
                if until is not None and time.monotonic() > until:
                    raise NoWorkers(
                        f"the workers of {self._config} are not ready in time", hint=self._read_last_messages()
                    )
                time.sleep(_POLL_S)
            self.url = self._find_url()
        except BaseException:
            self.stop()
            raise
        return self

    def _is_ready(self) -> bool:
        return any(line.startswith("ready: ") for line in _read_lines(self._out))

    def _find_url(self) -> str:
        if self._data_dir is None:
            return find_url(None, self._loaded, os.environ)
        url = running(self._data_dir)
        if url is None:
            raise BrokerUnavailable(f"the server of {self._data_dir} is gone", hint=START_ONE)
        return url

    def _make_error(self, status: int) -> MillstreamError:
        message = self._read_last_messages() or f"`millstream up` ended with status {status}"
        return _ERRORS.get(status, MillstreamError)(message)

    def _read_last_messages(self) -> str:
        """Returns the child's last messages on one line; the last lines of any output if it wrote no message."""
        lines = _read_lines(self._err)
        messages = [line.removeprefix(_PREFIX) for line in lines if line.startswith(_PREFIX)]
        return "; ".join((messages or lines)[-3:])


_living: weakref.WeakSet[Local] = weakref.WeakSet()


def _close_inherited_pipes() -> None:
    for local in list(_living):
        local.close_pipe()


os.register_at_fork(after_in_child=_close_inherited_pipes)


def _make_flags(data_dir: Path | None, replace: bool) -> list[str]:
    # Errors are read from its messages, so they are lines of text.
    flags = ["--until-eof", "--log-format", "text"]
    flags += ["--replace"] if replace else []
    return flags if data_dir is None else [*flags, "--data-dir", os.fspath(data_dir)]


def _read_lines(file: IO[bytes]) -> list[str]:
    # The child writes through the same open file, so reading must not move its position.
    size = os.fstat(file.fileno()).st_size
    text = os.pread(file.fileno(), _LOG_BYTES, max(0, size - _LOG_BYTES))
    return [line for line in text.decode(errors="replace").splitlines() if line.strip()]


def _end(process: subprocess.Popen[bytes], files: Sequence[IO[bytes]], owner: int) -> None:
    for file in files:
        file.close()
    if os.getpid() != owner:
        return
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
