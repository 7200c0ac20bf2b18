"""Shows the status of a long-running command: one redrawn line on a terminal, otherwise a new line for each change."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import Protocol

import click


class Status(Protocol):
    """Display of one status line. `show` raises nothing, because the command must go on if its reader ends."""

    detailed: bool
    """Whether the line should contain figures that change every second."""

    def show(self, line: str) -> None: ...


class Lines:
    """The status for a pipe or a file: prints a line if it differs from the previous one."""

    detailed = False

    def __init__(self) -> None:
        self._shown = ""

    def show(self, line: str) -> None:
        if line != self._shown:
            self._shown = line
            with suppress(OSError):
                click.echo(line)

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class Redrawn:
    """The status for a terminal: one line at the bottom; log lines of this process and its workers scroll above it.

    Workers inherit standard error and write to it. So it is replaced by a pipe, from which this class reads and prints.
    """

    detailed = True

    def __init__(self, where: str) -> None:
        # Imported here: rich takes 25 ms, and a status that goes to a pipe or a file does not need it.
        from rich.console import Console
        from rich.live import Live

        self._where = where
        self._shown = ""
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stderr=False)

    def show(self, line: str) -> None:
        from rich.text import Text

        if line != self._shown:
            self._shown = line
            with suppress(OSError):
                self._live.update(Text(f"{line}  {self._where}", no_wrap=True, overflow="ellipsis"), refresh=True)

    def __enter__(self) -> Redrawn:
        self._live.start()
        sys.stderr.flush()
        reading, writing = os.pipe()
        self._stderr = os.dup(2)
        os.dup2(writing, 2)
        os.close(writing)
        self._reader = threading.Thread(target=self._pass_on, args=(reading,), name="log lines", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stderr.flush()
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        # The reader ends when the last worker does. A worker that hangs in the kernel must not delay the exit.
        self._reader.join(1.0)
        with suppress(OSError):
            self._live.stop()

    def _pass_on(self, reading: int) -> None:
        with os.fdopen(reading, errors="replace") as lines:
            for line in lines:
                with suppress(OSError):
                    self._console.print(line.rstrip("\n"), markup=False, soft_wrap=True)


def status_line(where: str) -> Lines | Redrawn:
    """Returns Redrawn if standard output and error are a terminal, otherwise Lines. `where` is the server's URL."""
    interactive = sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Redrawn(where) if interactive else Lines()
