"""Progress of `millstream bulk run`: one line that changes on a terminal, a line every 10 s elsewhere."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from millstream.cli.table import age, quantity
from millstream.client import BulkProgress

TERMINAL_S, LOG_S = 0.5, 10.0
"""Seconds between two lines on a terminal, and elsewhere."""

GAP = "  "
"""Text between two parts of a line."""

DEFAULT_COLUMNS = 80
"""Columns of a terminal that does not say how many it has."""


class Display:
    """Context manager: in it a thread prints the progress that `show` was last given."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._latest: tuple[BulkProgress, float] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._print_until_over, name="progress", daemon=True)

    @property
    def began(self) -> bool:
        """Whether there was any progress to show."""
        return self._latest is not None

    def show(self, progress: BulkProgress) -> None:
        """Takes the newest progress."""
        self._latest = progress, time.monotonic()

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        # The reader of a pipe may have gone: the run is more than its progress.
        with suppress(OSError):
            if self._terminal and self.began:
                self._print_line()
                self._out.write("\n")
                self._out.flush()

    def _print_until_over(self) -> None:
        with suppress(OSError):
            while not self._over.wait(TERMINAL_S if self._terminal else LOG_S):
                self._print_line()

    def _print_line(self) -> None:
        if self._latest is None:
            return
        progress, since = self._latest
        parts = describe(progress, time.monotonic() - since)
        if self._terminal:
            # Not into the last column: some terminals then begin a new line.
            self._out.write(f"\r{fit(parts, _count_columns(self._out) - 1)}\x1b[K")
        else:
            self._out.write(f"{GAP.join(parts)}\n")
        self._out.flush()


def describe(progress: BulkProgress, since_s: float) -> Sequence[str]:
    """Returns the parts of a line about a progress that is `since_s` seconds old, the most important first."""
    parts = [f"{progress.rows:,} row{'s' if progress.rows != 1 else ''} {progress.share:.0%}"]
    if progress.rate:
        parts.append(f"{progress.rate:,.0f} rows/s" if progress.rate >= 10 else f"{progress.rate:.2g} rows/s")
    if progress.eta_s is not None and progress.share < 1.0:
        parts.append(f"eta {age(round(max(0.0, progress.eta_s - since_s) * 1000))}")
    parts.append(f"{progress.failed:,} failed")
    parts.append(quantity(progress.workers, "worker") if progress.workers else "no worker")
    return parts


def fit(parts: Sequence[str], columns: int) -> str:
    """Returns a line of at most `columns` columns with as many of the first parts as fit, none of them cut."""
    line = parts[0][:columns]
    for part in parts[1:]:
        if len(line) + len(GAP) + len(part) > columns:
            break
        line += GAP + part
    return line


def _count_columns(out: TextIO) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns or DEFAULT_COLUMNS
    except OSError:
        return DEFAULT_COLUMNS
