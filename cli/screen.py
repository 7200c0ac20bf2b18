"""The whole terminal, for a command that shows something that changes: drawn in place, keys read at once, restored."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from types import FrameType, TracebackType

from millstream.cli.main import TERMINATED

_ENTER = "\x1b[?1049h\x1b[?25l"
"""Shows the terminal's second screen, so that what was shown before comes back, and hides the cursor."""

_LEAVE = "\x1b[?25h\x1b[?1049l"


def can_draw() -> bool:
    """Returns whether standard output is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Screen:
    """Context manager for the main thread. Ctrl-Z stops the command as usual; SIGTERM ends it with exit status 143."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.fileno()
        self._keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None

    def draw(self, lines: Sequence[str]) -> None:
        """Shows `lines` from the top, and nothing else. Each must fit into the width, all of them into the height."""
        self._write("\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[K\x1b[J")

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines of the terminal; COLUMNS would not follow a change of its size."""
        columns, lines = os.get_terminal_size(self._terminal)
        # Some terminals do not know their size.
        return columns or 80, lines or 24

    def read_key(self, timeout_s: float) -> str:
        """Returns the key that is pressed within `timeout_s`, "" if none is."""
        watched = [] if self._keyboard is None else [self._keyboard]
        ready, _, _ = select.select(watched, [], [], timeout_s)
        if not ready:
            return ""
        pressed = os.read(ready[0], 1)
        if not pressed:
            # Its end: nobody can press a key any more.
            self._keyboard = None
        return pressed.decode(errors="replace")

    def __enter__(self) -> Screen:
        self._enter()
        self._before = {
            # It may be ignored: a shell starts programs in the background so.
            signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
            signal.SIGTERM: signal.signal(signal.SIGTERM, _end),
            signal.SIGTSTP: signal.signal(signal.SIGTSTP, self._suspend),
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _enter(self) -> None:
        if self._keyboard is not None:
            self._attributes = termios.tcgetattr(self._keyboard)
            tty.setcbreak(self._keyboard)
        self._write(_ENTER)

    def _leave(self) -> None:
        if self._keyboard is not None:
            termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._attributes)
        self._write(_LEAVE)

    def _write(self, text: str) -> None:
        # Not by sys.stdout: a signal handler that writes may interrupt a write.
        rest = text.encode(errors="replace")
        while rest:
            rest = rest[os.write(self._terminal, rest) :]

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        # Here it goes on after SIGCONT.
        self._enter()


def _end(number: int, frame: FrameType | None) -> None:
    # Not at once: the terminal is restored on the way out.
    sys.exit(TERMINATED)
