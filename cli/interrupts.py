"""Handles Ctrl-C, SIGTERM and a closed terminal in commands that run other processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Protocol


class Stoppable(Protocol):
    """Object that interrupts end: `stop` starts a drain, `kill` ends everything at once."""

    def stop(self) -> None: ...

    def kill(self) -> None: ...


def interrupt_at_eof(drain_s: float) -> None:
    """Interrupts this process when its standard input ends, and again `drain_s` seconds later.

    For a standard input that is a pipe: its end means that the program at the other end has ended, so that nobody waits
    for a long drain.
    """

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(drain_s)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end of file", daemon=True).start()


class Interrupts:
    """Context manager: in it the first signal starts a drain and the second one kills. No signal ends this process.

    A first signal before `attach` takes effect at `attach`; a second one raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.count = 0
        self._attached: Stoppable | None = None

    @property
    def drains(self) -> bool:
        return self.count > 0

    @property
    def kills(self) -> bool:
        return self.count > 1

    def attach(self, stoppable: Stoppable) -> None:
        self._attached = stoppable
        if self.drains:
            stoppable.stop()

    def __enter__(self) -> Interrupts:
        self._reading, self._writing = os.pipe()
        self._relay = threading.Thread(target=self._pass_on, name="interrupts", daemon=True)
        self._relay.start()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writing)
        self._relay.join()
        os.close(self._reading)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self._attached is None and self.kills:
            raise KeyboardInterrupt
        # A thread calls `stop`, not the handler: the handler may interrupt code that holds the lock which `stop` needs.
        os.write(self._writing, b"!")

    def _pass_on(self) -> None:
        while os.read(self._reading, 1):
            if self._attached is None:
                continue
            self._attached.stop()
            if self.kills:
                self._attached.kill()
