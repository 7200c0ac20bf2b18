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
"""Seconds of work after which a death is no early death."""

KILLED_S = 5.0
"""Seconds to wait for the end of a killed child: one that waits inside a driver does not end at once."""


@dataclass(slots=True, eq=False)
class Child:
    """A process and the page it shares with its supervisor.

    `ordered`: why the supervisor killed it, if no job was the cause, else "". `stuck`: the stuck stages for which it
    was killed. `ready_since`: monotonic seconds, None before it was ready.
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
        """Whether it was ready for more than STEADY_S seconds. Loading a model does not count."""
        return self.ready_since is not None and time.monotonic() - self.ready_since > STEADY_S

    def failures(self, before: int) -> int:
        """Early deaths in a row, this one included, after `before` of them.

        If it ran any forward, its device works and a job may be the cause, so the count starts again: poison jobs must
        not delay restarts as a broken device does.
        """
        if self.steady:
            return 0
        return 1 if self.progress.worked else before + 1

    @property
    def end(self) -> End:
        """Its end. Charged are the stuck stages, or all stages if none was stuck, or none if the end was ordered."""
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
        """Kills it if one of its threads is stuck: its jobs can run on other workers."""
        if self.stuck or self.ordered or not self.lives or not (stuck := self.progress.stuck()):
            return
        self.stuck = stuck
        stuck_s = max(snapshot.seconds for snapshot in stuck)
        self.progress.set_reason(f"no progress for {stuck_s:.1f} s, the stall_timeout is {self.progress.stall_s:g} s")
        # No wait for its end: a process inside a driver may take long, and the supervisor has other children.
        self.process.kill()

    def kill(self, why: str) -> None:
        """Kills it by order, which charges no job an attempt. If it is stuck, its stuck jobs stay charged."""
        if not self.stuck and self.lives:
            self.ordered = why
        self.process.kill()

    def await_end(self) -> None:
        """Waits for the end of a killed process, for at most KILLED_S seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILLED_S)

    def close(self) -> None:
        """Closes its pipe and its page. A living child takes that for the end of its supervisor, and drains."""
        if self.process.stdin:
            self.process.stdin.close()
        self.progress.close()


def _how(status: int | None) -> str:
    if status is None:
        return "was killed and has not ended yet"
    if status < 0:
        return f"was killed by {_signal_name(-status)}"
    return f"exited with status {status}"


def _signal_name(number: int) -> str:
    # Real-time signals have no name.
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
