"""Ctrl-C, SIGTERM and a closed terminal, for commands that own processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Protocol


class Stoppable(Protocol):
    """What an interrupt ends: `stop` asks for a drain, `kill` ends everything at once."""

    def stop(self) -> None: ...

    def kill(self) -> None: ...


def interrupt_at_eof(patience_s: float) -> None:
    """Interrupt this process when its standard input ends, and again `patience_s` later.

    For a pipe: whoever held its other end is gone, and nobody waits for a long drain.
    """

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience_s)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end of file", daemon=True).start()


class Interrupts:
    """While it is open the first signal asks for a drain and the next one kills; none ends this process by itself.

    Before anything is attached a first signal is kept for it, and a second raises KeyboardInterrupt.
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
        self._before = {number: signal.signal(number, self._noted) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writing)
        self._relay.join()
        os.close(self._reading)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self._attached is None and self.kills:
            raise KeyboardInterrupt
        # Not `stop` itself: a handler runs in the middle of whatever holds the lock that it needs.
        os.write(self._writing, b"!")

    def _pass_on(self) -> None:
        while os.read(self._reading, 1):
            if self._attached is None:
                continue
            self._attached.stop()
            if self.kills:
                self._attached.kill()
