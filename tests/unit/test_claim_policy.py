"""A worker's next step follows from what it holds and what it found, without threads: no suspect in company, none in
front of more urgent jobs, and no job that waits is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from contracts.held import claim_of
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.job import PRIORITIES
from millstream.broker.queue.claims import ClaimBudget, Claimed
from millstream.worker.scheduling.claim_policy import (
    FIRST,
    Claim,
    HoldBack,
    LastClaim,
    Overtake,
    Pause,
    RunSuspects,
    SleepInRedis,
    State,
    Step,
    WaitForTake,
    WaitUntilEmpty,
    next_step,
)

ROOM = ClaimBudget(jobs=8, rows=8, tokens=100)
URGENT = ClaimBudget(jobs=4, rows=4, tokens=100, streams=1, returned=1)
OF_TWO = URGENT._replace(streams=2, returned=2)

streams = st.integers(0, 3)
looks = st.builds(
    LastClaim,
    takes=st.sampled_from([1, 2]),
    found=st.booleans(),
    more_waiting=st.booleans(),
    blocked=streams,
    suspects=streams,
    alone=st.booleans(),
    paused=st.sampled_from([False, False, True]),
    asleep=st.booleans(),
    waited=st.booleans(),
)


@st.composite
def states(draw: st.DrawFn) -> State:
    """States that can be: what waits is held, and a window without rows has room."""
    empty_handed = draw(st.booleans())
    waiting = not empty_handed and draw(st.booleans())
    room = None if waiting and draw(st.booleans()) else ROOM._replace(empty_handed=empty_handed)
    return State(
        draw(looks),
        room,
        draw(st.sampled_from([None, URGENT, OF_TWO])),
        waiting,
        empty_handed,
        takes=2,
        forward_left_s=draw(st.sampled_from([0.0, 0.1, 60.0])),
        saved=draw(st.tuples(st.integers(0, 8), st.integers(0, 8))),
        batch_rows=4,
        less_urgent=waiting and draw(st.booleans()),
    )


@given(states())
def test_a_worker_that_holds_suspects_takes_nothing_beside_them(state: State) -> None:
    step = next_step(state._replace(last_claim=state.last_claim._replace(alone=True, paused=False)))

    assert state.empty_handed or step == WaitUntilEmpty()


@given(states())
def test_while_a_suspect_waits_a_worker_that_is_not_free_claims_only_what_is_more_urgent(state: State) -> None:
    last_claim, step = state.last_claim, next_step(state)

    if not last_claim.suspects or state.empty_handed:
        return
    assert not isinstance(step, SleepInRedis)
    if isinstance(step, Overtake) and last_claim.suspects == 1:
        assert state.less_urgent
        assert step.limit == URGENT
    elif isinstance(step, Claim | Overtake):
        assert max(step.limit.streams, step.limit.returned) < last_claim.suspects
        assert last_claim.suspects < 2 or state.saved[last_claim.suspects - 2] < state.batch_rows


def test_a_normal_suspect_is_passed_only_by_realtime_jobs_into_a_full_window() -> None:
    state = State(LastClaim(2, suspects=2, waited=True), room=None, urgent_room=OF_TWO, waiting=True, takes=2)

    assert next_step(state) == Overtake(OF_TWO._replace(streams=1, returned=1))


@given(states())
def test_while_a_realtime_suspect_waits_new_realtime_jobs_pass_what_is_less_urgent(state: State) -> None:
    last_claim = state.last_claim._replace(suspects=1, alone=False, paused=False, waited=True)
    step = next_step(state._replace(last_claim=last_claim))

    if state.empty_handed:
        return
    if not state.less_urgent:
        assert step == WaitUntilEmpty()
    elif state.urgent_room is not None:
        assert step == Overtake(URGENT)
    else:
        assert isinstance(step, WaitForTake)


@given(states())
def test_a_worker_that_is_free_claims_when_a_suspect_waits(state: State) -> None:
    step = next_step(
        state._replace(last_claim=state.last_claim._replace(suspects=state.last_claim.suspects or 3, paused=False))
    )

    assert not state.empty_handed or (isinstance(step, Claim) and step.limit.streams == step.limit.returned == 3)


@given(states())
def test_nothing_is_claimed_beyond_the_room_nor_at_once_from_a_paused_service(state: State) -> None:
    step = next_step(state)

    if isinstance(step, Claim | SleepInRedis):
        assert state.room is not None
        assert step.limit.rows <= state.room.rows
    if isinstance(step, Overtake):
        assert state.last_claim.waited
        assert step.limit in (URGENT, state.urgent_room)
        assert state.room is None or state.last_claim.suspects == 1 or state.last_claim.blocked == 1
    if state.last_claim.paused and not state.last_claim.waited:
        assert step == Pause()


@given(states())
def test_no_claim_asks_for_nothing_and_a_realtime_job_without_room_passes_what_waits(state: State) -> None:
    step = next_step(state)
    last_claim = state.last_claim._replace(
        blocked=1, suspects=0, takes=state.takes, alone=False, paused=False, waited=True
    )
    urged = next_step(state._replace(last_claim=last_claim, urgent_room=URGENT))

    # A claim also learns whether a pause is over.
    assert not isinstance(step, Claim | Overtake) or step.limit.streams or state.last_claim.paused
    assert urged == Overtake(URGENT) or not state.waiting


@given(states())
def test_a_worker_sleeps_only_with_nothing_in_hand_to_run_and_nothing_known_to_wait(state: State) -> None:
    step = next_step(state)

    if isinstance(step, SleepInRedis):
        assert not state.waiting
        assert not state.last_claim.suspects
        assert not step.limit.empty_handed
        assert not state.last_claim.found or not state.last_claim.more_waiting


@given(states())
def test_every_wait_ends_with_what_is_waited_for(state: State) -> None:
    step = next_step(state)

    if isinstance(step, WaitForTake):
        assert state.waiting
        assert 0.02 <= step.seconds <= 0.25
    if isinstance(step, WaitUntilEmpty):
        assert not state.empty_handed


@dataclass
class Worker:
    """A claimer, a runner and a queue in one: each wait of the claimer lets the runner take, or settles all."""

    jobs: list[list[tuple[int, float]]]
    last_claim: LastClaim = FIRST
    pool: list[int] = field(default_factory=list)
    unsettled: int = 0
    takes: int = 0
    ran: int = 0
    groups: list[list[float]] = field(default_factory=list)

    def state(self) -> State:
        rows = 8 - sum(self.pool)
        room = ClaimBudget(8, rows, 100, empty_handed=not self.unsettled) if rows > 0 else None
        return State(self.last_claim, room, None, bool(self.pool), not self.unsettled, self.takes, batch_rows=4)

    def do(self, step: Step) -> None:
        if isinstance(step, Claim | Overtake | SleepInRedis):
            self.claim(step.limit, asleep=isinstance(step, SleepInRedis))
        elif isinstance(step, WaitForTake):
            self.take()
        else:
            self.take()
            self.unsettled = len(self.pool)

    def take(self) -> None:
        if self.pool:
            self.pool.pop(0)
            self.takes += 1
            self.ran += 1

    def claim(self, limit: ClaimBudget, asleep: bool) -> None:
        """As claim.lua: more urgent jobs first, what does not fit is not overtaken, suspects alone."""
        taken, blocked = list[tuple[int, float]](), 0
        for at, waiting in enumerate(self.jobs[: limit.streams], start=1):
            for rows, attempts in list(waiting):
                free = limit.empty_handed and not taken
                if blocked or (attempts and not free):
                    continue
                if not free and sum(each[0] for each in taken) + rows > limit.rows:
                    blocked = at
                    continue
                taken.append((rows, attempts))
                waiting.remove((rows, attempts))
                if attempts:
                    blocked = 4
        suspects = next((at for at, each in enumerate(self.jobs, start=1) if any(job[1] for job in each)), 0)
        waiting_jobs = tuple(len(each) for each in self.jobs)
        claims = [claim_of(attempts=attempts) for _, attempts in taken]
        claimed = Claimed(0, waiting_jobs, suspects, False, blocked % 4, claims)
        self.last_claim = self.last_claim.then(claimed, limit, self.takes, asleep=asleep)
        self.pool += [rows for rows, _ in taken]
        self.unsettled += len(taken)
        self.groups.append([attempts for _, attempts in taken])


job = st.tuples(st.sampled_from([1, 1, 2, 3, 8, 50]), st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0]))


@given(st.lists(st.lists(job, max_size=8), min_size=len(PRIORITIES), max_size=len(PRIORITIES)))
def test_every_job_runs_after_few_steps_whatever_its_size_and_whatever_waits_beside_it(
    jobs: list[list[tuple[int, float]]],
) -> None:
    count = sum(map(len, jobs))
    worker = Worker(jobs)

    for _ in range(6 * count + 6):
        worker.do(next_step(worker.state()))

    assert worker.ran == count
    assert isinstance(next_step(worker.state()), SleepInRedis)
    assert all(len(group) == 1 for group in worker.groups if any(group))


@given(states())
def test_suspects_run_before_what_waits_where_they_may_and_nothing_less_urgent_is_claimed_with_them(
    state: State,
) -> None:
    step = next_step(state._replace(suspect_room=ROOM))

    if isinstance(step, RunSuspects):
        assert state.last_claim.suspects
        assert not state.empty_handed
        assert not state.last_claim.alone
        assert step.limit.streams < step.limit.returned == state.last_claim.suspects
    elif state.last_claim.suspects and not state.empty_handed:
        assert state.last_claim.alone or state.last_claim.paused


def test_a_busy_worker_with_slots_looks_sooner_since_rows_can_join_at_each_step() -> None:
    full = State(FIRST, None, URGENT, waiting=True, takes=2, has_slots=False)

    assert [next_step(full), next_step(full._replace(has_slots=True))] == [WaitForTake(0.02), WaitForTake(0.01)]


def test_a_worker_of_a_fair_service_claims_for_its_next_forward_late() -> None:
    """Jobs of tenants that come meanwhile are among them."""
    early = State(FIRST, ROOM, takes=2, forward_left_s=0.4, held_back_s=0.3)

    assert next_step(early) == HoldBack(0.3)
    assert isinstance(next_step(early._replace(held_back_s=0.0)), Claim)
