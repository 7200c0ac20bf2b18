"""A command on a terminal of its own, as a user has it: what is typed, and what is shown."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import cast

from e2e.cli_support import COMMAND, Shell, environment
from support import eventually

CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """Runs `millstream` with `words`; `shown` is all that came to the terminal, standard error included."""

    def __init__(
        self, shell: Shell, words: Sequence[str], *, term: str = "dumb", columns: int = 80, lines: int = 24
    ) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._shown = bytearray()
        self.process = subprocess.Popen(
            [COMMAND, *words],
            cwd=shell.home,
            env={**environment(shell.home, shell.url), "TERM": term},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # Ctrl-C reaches the processes of which it is the controlling terminal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # Raises if the last process has closed it.
        with suppress(OSError):
            while data := os.read(self._ours, 65_536):
                self._shown += data

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace").replace("\r\n", "\n")

    @property
    def attributes(self) -> list[object]:
        """The terminal's settings: echo, line by line or key by key, and the like."""
        return cast(list[object], termios.tcgetattr(self._ours))

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def shows(self, text: str, times: int = 1, *, within_s: float = 60.0) -> None:
        """Waits until `text` was shown so often; fails if the command ends before."""
        eventually(lambda: self.shown.count(text) >= times or self.process.poll() is not None, within_s=within_s)
        assert self.shown.count(text) >= times, self.shown

    def wait(self) -> int:
        """The exit status."""
        status = self.process.wait(60.0)
        self._reader.join(10.0)
        return status

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(10.0)
        os.close(self._ours)
