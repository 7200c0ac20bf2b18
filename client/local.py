"""A server and workers of a program's own: `millstream up` as a child process, which ends when the program does."""

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
"""How long workers may take to be ready: a first start can have a model to download."""

_END_S = 20.0
_POLL_S = 0.02
_LOG_BYTES = 64 * 1024
_SAYS = "millstream: "
_ERRORS: dict[int, type[MillstreamError]] = {
    error.exit_code: error for error in (ConfigError, BrokerUnavailable, ModelUnavailable)
}


class Local:
    """One running `millstream up`. `url` and `prefix` say where its services are.

    Its standard input is a pipe that nothing is ever written to: the pipe's end, however this process ends, is its own.
    """

    def __init__(self, config: Path, loaded: Config, data_dir: Path | None, *, replace: bool) -> None:
        self.prefix = loaded.redis.key_prefix
        self.url = ""
        self._config = config
        self._loaded = loaded
        self._data_dir = data_dir
        # Files, not pipes: nobody has to read them on.
        self._out, self._err = files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - _end closes
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "millstream.cli.main", "up", *_flags(data_dir, replace), "--", config],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,  # Ctrl-C is for this process
        )
        # Also where nobody closed the client: at the interpreter's exit, or when it is forgotten.
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
        """As Client.local: returns when the workers of every service are ready."""
        path, folder = Path(config), None if data_dir is None else Path(data_dir).expanduser()
        loaded = load(path)
        until = waits_until(timeout)
        try:
            return cls(path, loaded, folder, replace=replace)._await_ready(until)
        except BrokerUnavailable:
            # It may have found the server of a program that was just ending; now it starts one.
            return cls(path, loaded, folder, replace=replace)._await_ready(until)

    def stop(self) -> None:
        """End the child and all that it started. In a forked process this does nothing: it is its parent's."""
        self._end()

    def let_go(self) -> None:
        """In a forked child: a pipe that it kept open would outlive its parent."""
        if self._process.stdin:
            self._process.stdin.close()

    def _await_ready(self, until: float | None) -> Local:
        try:
            while not self._is_ready():
                if self._process.poll() is not None:
                    raise self._failure(self._process.returncode)
                if until is not None and time.monotonic() > until:
                    raise NoWorkers(f"the workers of {self._config} are not ready in time", hint=self._last_words())
                time.sleep(_POLL_S)
            self.url = self._find_url()
        except BaseException:
            self.stop()
            raise
        return self

    def _is_ready(self) -> bool:
        return any(line.startswith("ready: ") for line in _lines(self._out))

    def _find_url(self) -> str:
        if self._data_dir is None:
            return find_url(None, self._loaded, os.environ)
        url = running(self._data_dir)
        if url is None:
            raise BrokerUnavailable(f"the server of {self._data_dir} is gone", hint=START_ONE)
        return url

    def _failure(self, status: int) -> MillstreamError:
        words = self._last_words() or f"`millstream up` ended with status {status}"
        return _ERRORS.get(status, MillstreamError)(words)

    def _last_words(self) -> str:
        """Its last messages, on one line; whatever it said where there is none."""
        lines = _lines(self._err)
        said = [line.removeprefix(_SAYS) for line in lines if line.startswith(_SAYS)]
        return "; ".join((said or lines)[-3:])


_living: weakref.WeakSet[Local] = weakref.WeakSet()


def _forked() -> None:
    for local in list(_living):
        local.let_go()


os.register_at_fork(after_in_child=_forked)


def _flags(data_dir: Path | None, replace: bool) -> list[str]:
    flags = ["--until-eof"]
    flags += ["--replace"] if replace else []
    return flags if data_dir is None else [*flags, "--data-dir", os.fspath(data_dir)]


def _lines(file: IO[bytes]) -> list[str]:
    # The child writes through the same descriptor: reading must not move its position.
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
