"""Thread: claims jobs, prepares their rows, keeps the window filled while the model is busy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from millstream.broker.connection import is_transient
from millstream.broker.job import PRIORITIES, Claim, Priority
from millstream.broker.lease import Lease
from millstream.broker.streams import Claimed, Limit, Streams
from millstream.worker.intake import Intake
from millstream.worker.patience import Patience
from millstream.worker.settler import Finished
from millstream.worker.shared import Shared
from millstream.worker.shares import CLASSES, Shares

log = logging.getLogger(__name__)

SLEEP_S = 1.0
"""How long one wait in Redis lasts: also how late jobs that were given back are seen by an idle worker."""

LOOK_S, LONGEST_LOOK_S = 0.02, 0.25
"""How often a busy worker looks for jobs that came after its last claim: the oftener, the sooner its forward ends."""

RELIED_ON = 0.75
"""After this part of what is left of a forward, as foreseen, it looks again."""

LEAST_WAIT_S = 0.002

PAUSED_S = 0.25
"""How often the worker of a paused service looks whether it goes on."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Queue:
    """The claimer's way to its service: on the connection of `streams`, its own, it also sleeps until a job comes."""

    streams: Streams
    lease: Lease


@dataclass(frozen=True, slots=True)
class Policy:
    """When to wait for company, how long at most by priority (seconds), and who comes before whom."""

    patience: Patience
    batch_timeouts: dict[Priority, float]
    shares: Shares


class Claimer(threading.Thread):
    """Claims until the process drains, then closes the window. `live_workers` is what the last beat heard.

    `paused`: the last claim was given nothing because the service is paused. `_left_nothing`: it had nothing to give.
    `_streams` are those to look for new jobs in: fewer where a job of the next one has no room. `_looked_at`: as
    long as the window has had no more takes than that, what the last look did not give is no sooner to be had.
    """

    def __init__(
        self,
        shared: Shared,
        queue: Queue,
        intake: Intake,
        policy: Policy,
        finish: Callable[[Finished], None],
    ) -> None:
        super().__init__(name="claimer", daemon=True)
        self._consumer = shared.consumer
        self._window = shared.window
        self._clock = shared.clock
        self._life = shared.life
        self._queue = queue
        self._intake = intake
        self._patience = policy.patience
        self._batch_timeouts = policy.batch_timeouts
        self._shares = policy.shares
        self._finish = finish
        self._in_hand_s = 0.0
        self._suspects = False
        self._left_nothing = False
        self._streams = len(PRIORITIES)
        self._looked_at = -1
        self._pause_s = 0.0
        self._gathered: list[str] = []
        self.live_workers = 1
        self.paused = False

    def run(self) -> None:
        with self._life.guard():
            while not self._life.draining:
                self._step()
        self._window.close()

    def _step(self) -> None:
        try:
            self._recover()
            self._fill()
            if self.paused:
                self._life.pause(PAUSED_S)
        except Exception as error:
            self._window.forget(self._gathered)
            self._gathered.clear()
            if "NOGROUP" in str(error):
                # FLUSHALL or a lost stream: start over from the first entry, skipping nothing.
                self._queue.streams.create_groups()
            elif is_transient(error):
                self._away(error)
            else:
                raise

    def _away(self, error: Exception) -> None:
        if not self._pause_s:
            log.warning("the server is away, claiming goes on when it is back: %s", error)
        self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
        self._life.pause(self._pause_s)

    def _recover(self) -> None:
        """After a fault: give back what a cut-off reply may have left on our name without our knowing."""
        if self._pause_s:
            self._queue.streams.create_groups()
            lost = self._queue.lease.release(self._consumer, keep=self._window.names())
            log.warning("the server is back; %d claimed jobs whose delivery was cut off are given back", lost)
            self._pause_s = 0.0

    def _fill(self) -> None:
        takes = self._window.takes
        limit = self._window.room(self.live_workers)
        if limit is None:
            self._overtake()
            return
        if self._suspects and not limit.empty_handed:
            # A suspect waits to run alone, and this worker makes itself free for it.
            self._window.wait_until_empty(SLEEP_S)
            return
        if not self._may_look(takes):
            return
        claimed = self._claim(replace(limit, streams=self._streams))
        self._suspects = claimed.suspects > 0
        if claimed.blocked:
            self._streams = claimed.blocked - 1
        if claimed.blocked or not claimed.claims:
            self._looked_at = takes
        if claimed.claims:
            self._hold(self._with_company(claimed.claims))
        elif not self._window.waiting:
            self._idle()

    def _may_look(self, takes: int) -> bool:
        """Whether it is time to claim; False where a micro-batch was taken meanwhile, so that there is more room."""
        if self._looked_at != takes or not self._window.waiting:
            self._streams = len(PRIORITIES)
            return True
        return not self._wait_for_take()

    def _idle(self) -> None:
        if self._suspects:
            self._window.wait_until_empty(SLEEP_S)
        elif not self.paused:
            self._sleep()

    def _sleep(self) -> None:
        """Nothing waits anywhere: sleep in Redis until a job comes, then take what came with it.

        As long as nothing is left by that, and the runner takes what was held, asking anew would tell nothing.
        """
        while not self._life.draining:
            held = self._wake()
            if not self._left_nothing or (held and not self._taken_at_once()):
                break

    def _taken_at_once(self) -> bool:
        return self._window.wait_for_take(LOOK_S) and not self._window.waiting

    def _wake(self) -> bool:
        """Sleep in Redis until a job comes and hold it with what came with it; False where none is held."""
        limit = self._window.room(self.live_workers)
        if limit is None:
            return False
        # One more may come than is claimed: what waits to run alone is not for the same moment.
        limit = replace(limit, empty_handed=False, saved=self._spend_shares())
        claimed = self._queue.streams.wait(self._consumer, SLEEP_S, limit)
        self._note(claimed)
        # It may have waited for us: a process can be frozen, and sleeps here most of its time.
        if not self._clock.heard_late(claimed.now):
            self._clock.heard(self._queue.lease.now())
        if claimed.claims and claimed.paused:
            self._hand_back()
        elif claimed.claims:
            self._hold(self._with_company(claimed.claims))
            return True
        return False

    def _hand_back(self) -> None:
        """The service was paused while these were on their way here: they wait again, and nothing is counted."""
        self._queue.lease.release(self._consumer, only=self._gathered)
        self._window.forget(self._gathered)
        self._gathered.clear()

    def _rest(self) -> Claimed:
        """Claim on top of what was gathered and is not in the window yet."""
        limit = self._window.room(self.live_workers)
        if limit is None:
            return Claimed(self._clock.now())
        return self._claim(limit)

    def _claim(self, limit: Limit) -> Claimed:
        claimed = self._queue.streams.claim(self._consumer, replace(limit, saved=self._spend_shares()))
        self._clock.heard(claimed.now)
        self._note(claimed)
        return claimed

    def _note(self, claimed: Claimed) -> None:
        self.paused = claimed.paused
        # Where it took something, more may be given back than it counts: it looks no further than it takes.
        more = len(claimed.claims) > claimed.woken or any(claimed.waiting) or claimed.suspects
        self._left_nothing = not (more or claimed.paused)
        in_hand = map(self._window.waiting_of, PRIORITIES)
        self._shares.served(claimed.claims, [sum(each) for each in zip(claimed.waiting, in_hand, strict=True)])
        self._gather(claimed.claims)

    def _spend_shares(self) -> tuple[int, int]:
        """Spend each class's share on what is in hand first, which came before; the rows it may still be claimed."""
        normal, batch = (self._spend_share(*each) for each in zip(CLASSES, self._shares.saved(), strict=True))
        return normal, batch

    def _spend_share(self, priority: Priority, saved: int) -> int:
        if not self._window.waiting_of(priority):
            return saved
        self._shares.spent(priority, self._window.spend_share(priority, saved))
        return 0

    def _overtake(self) -> None:
        """The window is full: realtime jobs may still come, one micro-batch, ahead of what waits there."""
        if self._wait_for_take():
            return
        budget = self._window.budget
        room = budget.rows - self._window.waiting_realtime
        if room > 0:
            limit = Limit(jobs=room, rows=room, tokens=budget.tokens, streams=1, returned=1)
            claimed = self._claim(limit)
            self._hold(claimed.claims)

    def _wait_for_take(self) -> bool:
        """Until a micro-batch is taken; False where it is time to look.

        What comes runs after this forward at the earliest, and each look takes time from a model that fills all cores.
        But how long a forward takes is foreseen from others, so a part of that is not relied on.
        """
        return self._window.wait_for_take(min(LONGEST_LOOK_S, max(LOOK_S, RELIED_ON * self._window.forward_left_s)))

    def _gather(self, claims: Sequence[Claim]) -> None:
        """Hold these entries in name until their rows are in the window, so that no beat takes them for strangers."""
        names = [claim.address.name for claim in claims]
        self._window.keep(names)
        self._gathered += names

    def _with_company(self, gathered: list[Claim]) -> list[Claim]:
        """Where the model is idle, wait for more while more is likely; at most batch_timeout from the first job."""
        self._observe(len(gathered))
        # The least patient of them decides for all.
        self._patience.batch_timeout_s = min(self._batch_timeouts[claim.address.priority] for claim in gathered)
        first = last = time.monotonic()
        while self._window.idle and sum(_rows(claim) for claim in gathered) < self._window.budget.rows:
            since = time.monotonic()
            wait_s = self._patience.wait_s(since - first, since - last)
            # What company saves is a forward: one that is over sooner than the shortest wait is not worth any.
            if not wait_s or self._window.cost.smallest_s < LEAST_WAIT_S or self._life.draining:
                break
            # Not a blocking read: an idle server ends one up to 100 ms late (its timer runs 10 times a second).
            self._life.pause(max(LEAST_WAIT_S, wait_s / 4))
            more = self._rest().claims
            self._patience.observe(len(more), time.monotonic() - since)
            gathered += more
            last = time.monotonic() if more else last
        if last == first and time.monotonic() - first > LEAST_WAIT_S:
            self._patience.waited_in_vain()
        return gathered

    def _observe(self, arrived: int) -> None:
        """Tell patience what came while others were in hand; the first job after idleness came to nobody's company."""
        in_hand_s = self._window.in_hand_s()
        alone = self._window.idle
        self._patience.observe(arrived - alone, in_hand_s - self._in_hand_s)
        self._in_hand_s = in_hand_s

    def _hold(self, claims: list[Claim]) -> None:
        held, finished = self._intake.admit(claims, self._clock.now())
        for each in finished:
            self._finish(each)
        self._window.hold(held)
        self._gathered.clear()


def _rows(claim: Claim) -> int:
    return claim.job.rows if claim.job else 0
