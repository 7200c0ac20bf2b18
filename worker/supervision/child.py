"""One running worker process, as its supervisor sees it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from millstream.broker.queue.drains import Order
from millstream.worker.supervision.charging import NOT_CHARGED, Charged, End
from millstream.worker.supervision.progress import Progress, Snapshot, State

STEADY_S = 30.0
"""Seconds of work after which a death is no early death."""

KILLED_S = 5.0
"""Seconds to wait for the end of a killed child: one that waits inside a driver does not end at once."""


@dataclass(slots=True, eq=False)
class Child:
    """A process and the pages it shares with its supervisor, one for each service that it hosts.

    `ordered`: why the supervisor killed it, if no job was the cause, else "". `stuck`: the stuck stages for which it
    was killed. `ready_since`: monotonic seconds, None before it was ready. `drain_until`: monotonic seconds until
    which it may drain, None if no operator ordered it to end.
    """

    consumer: str
    process: subprocess.Popen[bytes]
    pages: Mapping[str, Progress]
    ready_since: float | None = None
    ordered: str = ""
    stuck: Charged = field(default_factory=dict)
    drain_until: float | None = None

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    @property
    def ready(self) -> bool:
        return self.lives and all(page.state == State.READY for page in self.pages.values())

    @property
    def unready(self) -> Mapping[str, str]:
        """The services whose models it has not loaded, with the reason if a load failed, else ""."""
        return {name: page.reason for name, page in self.pages.items() if page.state != State.READY}

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
        return 1 if any(page.worked for page in self.pages.values()) else before + 1

    @property
    def end(self) -> End:
        """Its end, as `end_of` says it of each service, with the stages of all of them."""
        charged = self._charged
        return self._end_with([stage for service in self.pages for stage in charged.get(service, ())])

    def end_of(self, service: str) -> End:
        """Its end for the jobs of `service`.

        Charged are the stuck stages, or all stages if none was stuck, or none if the end was ordered. A job is in a
        stage of its own service only, so other services cost it nothing while it waits.
        """
        return self._end_with(self._charged.get(service, ()))

    @property
    def _charged(self) -> Charged:
        if self.ordered:
            return NOT_CHARGED
        return self.stuck or {service: page.snapshots() for service, page in self.pages.items()}

    def _end_with(self, charged: Sequence[Snapshot]) -> End:
        status = self.process.returncode
        if self.ordered:
            return End(_how(status), why=self.ordered)
        in_a_stage = any(self._charged.values())
        ready = any(page.state == State.READY for page in self.pages.values())
        drained = status == 0 and not in_a_stage and not ready
        return End("drained" if drained else _how(status), charged, self.reason[1])

    @property
    def reason(self) -> tuple[str, str]:
        """The service that made the process end, and the noted reason; if none is noted, the first service, and ""."""
        noted = [(service, page.reason) for service, page in self.pages.items() if page.reason]
        return noted[0] if noted else (next(iter(self.pages)), "")

    def note_ready(self) -> None:
        if self.ready_since is None and self.ready:
            self.ready_since = time.monotonic()

    def end_stuck(self) -> None:
        """Kills it if one of its threads is stuck: its jobs can run on other workers."""
        if self.stuck or self.ordered or not self.lives:
            return
        stuck = {service: stages for service, page in self.pages.items() if (stages := page.stuck())}
        if not stuck:
            return
        self.stuck = stuck
        for service, stages in stuck.items():
            page, stuck_s = self.pages[service], max(stage.seconds for stage in stages)
            page.set_reason(f"no progress for {stuck_s:.1f} s, the stall_timeout is {page.stall_s:g} s")
        # No wait for its end: a process inside a driver may take long, and the supervisor has other children.
        self.process.kill()

    def follow(self, order: Order, drain_s: float) -> None:
        """Makes it end as an operator orders: at once, or when it has settled its jobs, after `drain_s` at most."""
        now = time.monotonic()
        is_new = self.drain_until is None
        self.drain_until = now + drain_s if self.drain_until is None else self.drain_until
        if self.ordered or not self.lives:
            return
        if order == "stop":
            self.kill("it was stopped by an operator")
        elif is_new:
            self.process.send_signal(signal.SIGTERM)
        elif now > self.drain_until:
            self.kill(f"it did not drain in {drain_s:g} s")

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
        """Closes its pipe and its pages. A living child takes that for the end of its supervisor, and drains."""
        if self.process.stdin:
            self.process.stdin.close()
        for page in self.pages.values():
            page.close()


def _how(status: int | None) -> str:
    if status is None:
        return "was killed and has not ended yet"
    if status < 0:
        return f"was killed by {_signal_name(-status)}"
    return f"exited with status {status}"


def _signal_name(number: int) -> str:
    # Real-time signals have no name.
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
