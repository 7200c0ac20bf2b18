"""Decides a worker's next step, which keeps its window filled: a pure function of its state and its last claim.

A suspect waits for a worker that holds nothing. A job that does not fit and is larger than a window, or than its class
may save, also waits for such a worker and counts as a suspect here. While a suspect waits, the worker claims only more
urgent jobs, so that it becomes free. When the class of the suspect has saved a micro-batch, the worker claims nothing
until it is free. While a realtime suspect waits, new realtime jobs are claimed as long as less urgent rows wait here,
since those keep the worker busy anyway.

A supervised worker need not become free, unless rows that are more urgent than the suspect wait here. After the running
forward it sets the waiting rows aside and runs the suspects first. If it dies, its supervisor charges the suspects
only, since the other jobs only waited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from millstream.broker.contract.job import PRIORITIES
from millstream.broker.queue.claims import ClaimBudget, Claimed
from millstream.broker.queue.lease import SUSPECT_ATTEMPTS

SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.02, 0.05
"""Seconds between two claims of a busy worker, at least and at most. It is shorter if the forward ends sooner.

An urgent job that is claimed just after a forward began waits for all of it, so a prediction that is too long must not
make the worker miss the end of the one before.
"""

SHORTEST_WAIT_OF_SLOTS_S = 0.01
"""SHORTEST_WAIT_S if rows have slots: a more urgent row need not wait for others to end, only for the next step."""

RELIED_ON = 0.75
"""Part of the predicted rest of a forward after which the worker claims again. The prediction may be too long."""


class LastClaim(NamedTuple):
    """Result of the last claim; `asleep`: it was a blocking read.

    `takes`: value of `window.takes` before it. `found`: it returned jobs. `more_waiting`: more jobs wait in the queue.
    `blocked`: the stream whose next job had no room, 0 for none. `suspects`: the most urgent stream in which suspects
    wait, 0 for none. `alone`: it returned suspects. `paused`: the service is paused. `waited`: a wait has ended since,
    without a take.
    """

    takes: int = -1
    found: bool = True
    more_waiting: bool = True
    blocked: int = 0
    suspects: int = 0
    alone: bool = False
    paused: bool = False
    asleep: bool = False
    waited: bool = False

    def then(self, claimed: Claimed, limit: ClaimBudget, takes: int, *, asleep: bool = False) -> LastClaim:
        """The next value, from a claim within `limit` that returned `claimed`; `takes`: its value before that claim."""
        not_asked = self.takes == takes and limit.streams < self.blocked
        return LastClaim(
            takes,
            found=bool(claimed.claims),
            more_waiting=any(claimed.waiting),
            blocked=claimed.blocked or (self.blocked if not_asked else 0),
            suspects=claimed.suspects,
            alone=any(claim.attempts >= SUSPECT_ATTEMPTS for claim in claimed.claims),
            paused=claimed.paused,
            asleep=asleep,
        )


FIRST = LastClaim()
"""Value before the first claim, and after a fault: nothing is known of the queue."""


class State(NamedTuple):
    """State of one worker at one moment.

    `room`: budget of a claim, None if the window is full. `urgent_room`: budget of a claim into a full window, of jobs
    more urgent than what fills it; None if there is none. `waiting`: rows wait for the runner. `empty_handed`: every
    entry is settled and no forward runs. `takes`: micro-batches taken so far. `forward_left_s`: predicted seconds until
    the running forward ends. `saved`: rows that normal and batch jobs may run before more urgent ones, 0 if such rows
    wait here. `batch_rows`: rows of a micro-batch. `less_urgent`: rows of normal or batch jobs wait for the runner.
    `suspect_room`: budget of a claim of suspects that run before the waiting rows, None if they have to wait until the
    worker is free. `has_slots`: rows have slots of an engine, for many steps. `is_apart`: the suspects of the last
    claim have output, so other rows may run beside them. `held_back_s`: seconds for which a worker of a fair service
    claims nothing for its next forward.
    """

    last_claim: LastClaim
    room: ClaimBudget | None
    urgent_room: ClaimBudget | None = None
    waiting: bool = False
    empty_handed: bool = False
    takes: int = 0
    forward_left_s: float = 0.0
    saved: Sequence[int] = (0, 0)
    batch_rows: int = 1
    less_urgent: bool = False
    suspect_room: ClaimBudget | None = None
    has_slots: bool = False
    is_apart: bool = False
    held_back_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim within `limit`."""

    limit: ClaimBudget


@dataclass(frozen=True, slots=True)
class Overtake:
    """Claim more urgent jobs within `limit`, though the window is full or the worker has to become free."""

    limit: ClaimBudget


@dataclass(frozen=True, slots=True)
class SleepInRedis:
    """Sleep until a new job comes; claim it and others within `limit`."""

    limit: ClaimBudget


@dataclass(frozen=True, slots=True)
class WaitForTake:
    """Wait until the runner takes a micro-batch, for `seconds` at most."""

    seconds: float


@dataclass(frozen=True, slots=True)
class WaitUntilEmpty:
    """Wait until every held entry is settled and no forward runs."""


@dataclass(frozen=True, slots=True)
class RunSuspects:
    """Set the waiting rows aside, claim suspects within `limit`, and wait until they are settled."""

    limit: ClaimBudget


@dataclass(frozen=True, slots=True)
class HoldBack:
    """Wait for `seconds` while a forward runs, or until it ends, and then claim for the next one."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait a moment, since the service is paused."""


Step = Claim | Overtake | SleepInRedis | WaitForTake | WaitUntilEmpty | RunSuspects | HoldBack | Pause


def next_step(state: State) -> Step:
    """The next step. The claimer asks again after each step."""
    last_claim = state.last_claim
    if last_claim.paused and not last_claim.waited:
        return Pause()
    last = _last_stream(state)
    if last_claim.alone and not (state.empty_handed or state.is_apart):
        return WaitUntilEmpty()
    if last_claim.suspects and state.suspect_room and not state.empty_handed:
        return RunSuspects(state.suspect_room._replace(streams=last, returned=last_claim.suspects))
    if not last:
        return _past_a_full_window(state, 1) if last_claim.suspects == 1 and state.less_urgent else WaitUntilEmpty()
    with_room = _last_with_room(state)
    if state.room is None or (state.waiting and not with_room):
        return _past_a_full_window(state, last)
    if state.held_back_s and not state.waiting:
        return HoldBack(state.held_back_s)
    if not last_claim.paused:
        if state.waiting and not last_claim.waited and _is_exhausted(state):
            return _wait_for_take(state)
        is_done = not state.waiting and not (with_room and _may_find_more(state))
        if is_done and (rest := _rest(state, state.room)):
            return rest
    return Claim(_first_of(state.room, min(last, with_room), last))


def _first_of(room: ClaimBudget, streams: int, returned: int) -> ClaimBudget:
    """`room` for new jobs of the first `streams` and returned jobs of the first `returned`."""
    if (streams, returned) == (room.streams, room.returned):
        return room
    return room._replace(streams=streams, returned=returned)


def _last_stream(state: State) -> int:
    """The least urgent stream to claim from, before that of a suspect; 0 if its class has saved a micro-batch."""
    suspects = state.last_claim.suspects
    if state.empty_handed or not suspects:
        return len(PRIORITIES)
    is_due = suspects > 1 and state.saved[suspects - 2] >= state.batch_rows
    return 0 if is_due else suspects - 1


def _last_with_room(state: State) -> int:
    """The least urgent stream whose next job may have room. A take makes room; an empty worker has room for any job."""
    last_claim = state.last_claim
    is_blocked = last_claim.blocked and state.takes == last_claim.takes and not state.empty_handed
    return last_claim.blocked - 1 if is_blocked else len(PRIORITIES)


def _is_exhausted(state: State) -> bool:
    """Whether another claim now would probably find nothing."""
    last_claim = state.last_claim
    took_all = not last_claim.found or bool(last_claim.blocked) or (last_claim.asleep and not last_claim.more_waiting)
    return took_all and state.takes == last_claim.takes


def _may_find_more(state: State) -> bool:
    """Whether a worker without waiting rows should claim rather than rest."""
    last_claim = state.last_claim
    if state.empty_handed and (last_claim.suspects or last_claim.blocked):
        return True
    if last_claim.asleep:
        return last_claim.more_waiting
    return state.takes != last_claim.takes or (last_claim.found and not last_claim.blocked)


def _rest(state: State, room: ClaimBudget) -> Step | None:
    """The step if nothing can be claimed and no row waits here; None to claim all the same."""
    if state.last_claim.suspects or state.last_claim.blocked:
        if not state.has_slots:
            return WaitUntilEmpty()
        # Rows keep their slots for long: the worker need not become empty first.
        return None if state.last_claim.waited else _wait_for_take(state)
    # The blocking read itself may bring a job, so the claim after it must not bring jobs that have to run alone.
    return SleepInRedis(room._replace(empty_handed=False) if room.empty_handed else room)


def _past_a_full_window(state: State, last: int) -> Step:
    """Claims what is more urgent than the waiting rows, of the first `last` streams."""
    if state.last_claim.waited and (room := state.urgent_room) is not None:
        return Overtake(_first_of(room, min(room.streams, last), min(room.returned, last)))
    return _wait_for_take(state)


def _wait_for_take(state: State) -> WaitForTake:
    """Waits for most of the running forward: new jobs cannot run earlier, and a claim takes CPU time from the model."""
    shortest = SHORTEST_WAIT_OF_SLOTS_S if state.has_slots else SHORTEST_WAIT_S
    return WaitForTake(min(LONGEST_WAIT_S, max(shortest, RELIED_ON * state.forward_left_s)))
