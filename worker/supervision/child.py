"""One running worker process, as its supervisor sees it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from millstream.worker.supervision.charging import End
from millstream.worker.supervision.progress import Progress, Snapshot, State

STEADY_S = 30.0
KILLED_S = 5.0
"""How long to wait for a killed child: one that waits inside a driver is not gone at once."""


@dataclass(slots=True, eq=False)
class Child:
    """A process and the page it shares with its supervisor.

    `ordered` is why its supervisor killed it, if it did and no job was the cause; `stuck` is what it was killed over.
    """

    consumer: str
    process: subprocess.Popen[bytes]
    progress: Progress
    ready_since: float | None = None
    ordered: str = ""
    stuck: Sequence[Snapshot] = ()

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    @property
    def ready(self) -> bool:
        return self.lives and self.progress.state == State.READY

    @property
    def steady(self) -> bool:
        """Whether it worked for a while. To load a model, however long that takes, is no work yet."""
        return self.ready_since is not None and time.monotonic() - self.ready_since > STEADY_S

    def failures(self, before: int) -> int:
        """Early deaths in a row with this one, after `before` of them.

        If it had done any work its device is sound, and a job may be what it died of: the row starts again. Poison
        jobs must not slow a service down, which a device that answers nothing does.
        """
        if self.steady:
            return 0
        return 1 if self.progress.worked else before + 1

    @property
    def end(self) -> End:
        """How it ended, and what is charged for it: nothing if that was ordered, what was stuck if it was that."""
        status = self.process.returncode
        if self.ordered:
            return End(_how(status), why=self.ordered)
        charged = self.stuck or self.progress.snapshots()
        drained = status == 0 and not charged and self.progress.state != State.READY
        return End("drained" if drained else _how(status), charged, self.progress.reason)

    def note_ready(self) -> None:
        if self.ready_since is None and self.ready:
            self.ready_since = time.monotonic()

    def end_stuck(self) -> None:
        """Kill it if one of its threads is stuck: whatever it waits for, its jobs can run elsewhere."""
        if self.stuck or self.ordered or not self.lives or not (stuck := self.progress.stuck()):
            return
        self.stuck = stuck
        stuck_s = max(snapshot.seconds for snapshot in stuck)
        self.progress.set_reason(f"no progress for {stuck_s:.1f} s, the stall_timeout is {self.progress.stall_s:g} s")
        # Not waited for: a process that waits inside a driver would keep its supervisor from all others.
        self.process.kill()

    def kill(self, why: str) -> None:
        """Kill it by order, which costs no job an attempt, unless it is being killed because it is stuck."""
        if not self.stuck and self.lives:
            self.ordered = why
        self.process.kill()

    def await_end(self) -> None:
        """Wait for the end of a killed process, for at most KILLED_S seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILLED_S)

    def close(self) -> None:
        """Close its pipe and its page. If it lives, it takes that for the end of its supervisor."""
        if self.process.stdin:
            self.process.stdin.close()
        self.progress.close()


def _how(status: int | None) -> str:
    if status is None:
        return "was killed and is not gone yet"
    if status < 0:
        return f"was killed by {_signal_name(-status)}"
    return f"exited with status {status}"


def _signal_name(number: int) -> str:
    # Real-time signals have no name.
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
