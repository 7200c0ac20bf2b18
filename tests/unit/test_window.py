"""What a worker holds: no row is lost between the threads that meet here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
from contracts.held import claim_of, held_of
from support import eventually

from millstream.broker.contract.errors import ModelFailed
from millstream.broker.contract.job import Claim, Priority
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import ActiveJob, Outcome, Rows
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.scheduling.batches import HOLD_BATCHES, LEAST_BATCHES
from millstream.worker.scheduling.fair_share import SAVED_BATCHES
from millstream.worker.window import Window

LONG_S = 10.0


@pytest.fixture
def window() -> Window:
    return Window(Budget(rows=4, tokens=100))


def asleep(window: Window, action: Callable[[], object]) -> Callable[[], object]:
    """Start `action` beside the test and let it fall asleep in the window; the answer waits for what it returned."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    # Nothing public says that a thread sleeps; without knowing it these tests would pass with no notification at all.
    conditions = (window._rows_arrived, window._batch_taken, window._emptied)
    eventually(lambda: any(getattr(each, "_waiters") for each in conditions))  # noqa: B009

    def result() -> object:
        thread.join(LONG_S)
        assert results, "it did not return in time"
        return results[0]

    return result


def test_a_worker_of_a_fair_service_holds_one_micro_batch(window: Window) -> None:
    """A job of a tenant that just came waits for all that is held."""
    window.limit(4, 100, None, is_fair=True)

    room = window.room(1, 3, (1, 1))

    assert room is not None
    assert (room.rows, room.tokens) == (4, 100)


def test_a_worker_of_a_fair_service_is_held_back_for_most_of_a_forward(window: Window) -> None:
    window.cost.seconds_per_token = 1.0
    window.limit(4, 100, None, is_fair=True)
    window.hold([held_of([10])])
    assert window.held_back_s == 0.0

    window.take()

    assert 0 < window.held_back_s < 0.75 * window.cost.predicted_s(10)
    window.limit(4, 100, None)
    assert window.held_back_s == 0.0


def test_rows_come_back_as_the_jobs_they_came_from(window: Window) -> None:
    jobs = [held_of([3, 3]), held_of([3]), held_of([3, 3])]
    window.hold(jobs)

    done = []
    while window.waiting:
        rows = window.take()
        done += window.complete(rows, [f"{row.owner} {row.index}" for row in rows])

    assert sorted(each.name for each in done) == sorted(each.name for each in jobs)
    for job in jobs:
        assert job.reply().values == [f"{job.name} {row}" for row in range(len(job.prepared))]


def test_a_job_whose_rows_run_in_two_batches_is_complete_with_the_last(window: Window) -> None:
    window.hold([held := held_of([3] * 6)])

    first, second = window.take(), window.take()

    assert window.complete(second, ["x"] * len(second)) == []
    assert window.complete(first, ["x"] * len(first)) == [held]


def test_a_job_that_is_cancelled_between_its_claim_and_its_coming_here_never_runs(window: Window) -> None:
    unwanted, wanted = held_of([3]), held_of([3])
    window.keep([unwanted.name, wanted.name])

    assert window.cancel([unwanted.name, "1:7-7"]) == []

    assert window.hold([unwanted, wanted]) == [unwanted]
    assert [row.owner for row in window.take()] == [wanted.name]
    assert window.hold([unwanted]) == [], "it may be claimed again under this name"


def test_the_more_urgent_priority_is_taken_first_and_then_the_older(window: Window) -> None:
    urgency = [(Priority.BATCH, 1), (Priority.NORMAL, 2), (Priority.NORMAL, 1), (Priority.REALTIME, 9)]
    jobs = [held_of([100], claim_of(priority=priority, at=at)) for priority, at in urgency]
    window.hold(jobs)

    taken = [window.take()[0].owner for _ in jobs]

    assert taken == [jobs[3].name, jobs[2].name, jobs[1].name, jobs[0].name]


def entry_of(claim: Claim, entry: str) -> Claim:
    return claim._replace(address=claim.address._replace(name=f"2:{entry}"))


def test_jobs_of_one_millisecond_run_one_after_the_other_in_the_order_of_their_entries(window: Window) -> None:
    # Each has a row of each length: neighbours in length, and the shortest rows, are those of other jobs.
    jobs = [held_of([20, 40, 80], entry_of(claim_of(["x"] * 3), f"5-{sequence}")) for sequence in (9, 10, 11)]
    window.limit(1, 100, None)
    window.hold(jobs[::-1])

    taken = [window.take()[0].owner for _ in range(9)]

    assert taken == [job.name for job in jobs for _ in range(3)]


@pytest.fixture
def first() -> ActiveJob:
    """The oldest job."""
    return held_of([20, 30], claim_of(["x"] * 2, at=5))


@pytest.fixture
def foreseen(window: Window, first: ActiveJob) -> list[Prepared]:
    """What comes next, as the window said; then neighbours came that would have been the better company."""
    window.hold([first, held_of([80], claim_of(at=9))])
    upcoming = list(window.upcoming())
    assert [row.tokens for row in upcoming] == [20, 30]
    window.hold([held_of([20, 20, 20], claim_of(at=10))])
    return upcoming


def test_what_was_foreseen_comes_next_whatever_came_behind_it(window: Window, foreseen: list[Prepared]) -> None:
    assert [row.payload for row in window.take()] == foreseen
    assert sorted(row.tokens for _ in range(2) for row in window.take()) == [20, 20, 20, 80]
    assert not window.waiting


@pytest.mark.parametrize("change", ["more urgent", "ended", "fewer rows", "fewer tokens"])
def test_what_was_foreseen_gives_way(window: Window, first: ActiveJob, foreseen: list[Prepared], change: str) -> None:
    if change == "more urgent":
        window.hold([held_of([50], claim_of(priority=Priority.REALTIME, at=9))])
    elif change == "ended":
        window.end([first.name])
    elif change == "fewer rows":
        window.limit(1, 100, None)
    else:
        window.limit(4, 40, None)

    taken = [row.payload for row in window.take()]

    assert taken != foreseen
    assert [row.tokens for row in taken] == {
        "more urgent": [50],
        "ended": [80],
        "fewer rows": [20],
        "fewer tokens": [20, 20],
    }[change]


def test_nothing_is_foreseen_that_more_arrivals_would_make_larger(window: Window) -> None:
    assert list(window.upcoming()) == []
    window.hold([held_of([20, 20], claim_of(at=5))])
    assert list(window.upcoming()) == []
    window.hold([held_of([20], claim_of(at=6))])

    assert [row.tokens for row in window.take()] == [20, 20, 20]


def test_a_row_that_has_its_error_already_is_not_run(window: Window) -> None:
    window.hold([held := held_of([3, ModelFailed("bad row"), 5])])

    rows = window.take()
    window.complete(rows, [np.full(2, row.index, dtype=np.float32) for row in rows])

    reply = held.reply()
    assert sorted(row.index for row in rows) == [0, 2]
    assert list(reply.errors) == [1]
    assert reply.vectors is not None
    assert reply.vectors.tolist() == [[0, 0], [2, 2]]
    assert reply.tokens == 8


@pytest.mark.parametrize("rows", [1, 3])
def test_vectors_are_answered_as_one_array_whatever_the_number_of_rows(window: Window, rows: int) -> None:
    window.hold([held := held_of([3] * rows)])

    window.complete(window.take(), [np.full(2, at, dtype=np.float32) for at in range(rows)])

    vectors = held.reply().vectors
    assert vectors is not None
    assert vectors.tolist() == [[at, at] for at in range(rows)]


def test_results_of_different_shapes_are_the_models_failure(window: Window) -> None:
    window.hold([ragged := held_of([3, 3]), mixed := held_of([3, 3])])

    window.complete(window.take(), [*(np.zeros(size, np.float32) for size in (2, 3, 2)), "text"])

    for held in (ragged, mixed):
        assert [type(error) for error in held.reply().errors.values()] == [ModelFailed] * 2


@pytest.mark.parametrize("odd", [None, "text", np.zeros(3, np.float32)])
def test_a_result_of_another_shape_than_most_fails_alone(window: Window, odd: Outcome) -> None:
    window.hold([held := held_of([3, 3, 3])])

    rows = window.take()
    window.complete(rows, [odd if row.index == 1 else np.full(2, row.index, np.float32) for row in rows])

    reply = held.reply()
    assert {at: type(error) for at, error in reply.errors.items()} == {1: ModelFailed}
    assert reply.vectors is not None
    assert reply.vectors.tolist() == [[0, 0], [2, 2]]


def test_results_that_are_json_stay_in_row_order_beside_errors(window: Window) -> None:
    window.hold([held := held_of([3, 4, 5])])

    rows = window.take()
    window.complete(rows, [ModelFailed("one") if row.index == 1 else f"answer {row.index}" for row in rows])

    assert held.reply().values == ["answer 0", "answer 2"]
    assert held.reply().vectors is None


def test_a_job_that_ended_is_neither_taken_nor_completed(window: Window) -> None:
    gone, stays = held_of([3] * 6), held_of([3])
    window.hold([gone, stays])
    running = window.take()

    assert window.end([gone.name]) == [gone]
    assert window.end([gone.name]) == []

    done = window.complete(running, ["x"] * len(running))
    while window.waiting:
        rows = window.take()
        assert {row.owner for row in rows} == {stays.name}
        done += window.complete(rows, ["x"] * len(rows))
    assert done == [stays]


def test_a_batch_and_its_outcomes_must_agree_in_number(window: Window) -> None:
    window.hold([held_of([3, 3])])

    with pytest.raises(ValueError, match="zip"):
        window.complete(window.take(), ["one"])


def test_held_entries_are_named_until_they_are_forgotten(window: Window) -> None:
    held = held_of()
    window.keep(["1:1-1", held.name])
    window.hold([held])
    rows = window.take()
    window.complete(rows, ["x"])
    assert sorted(window.names()) == sorted(["1:1-1", held.name])

    window.forget([held.name, "3:unknown"])

    assert window.names() == ["1:1-1"]


def test_a_window_has_room_for_some_batches_and_then_none(window: Window) -> None:
    window.cost.seconds_per_token = 1e-6
    most = HOLD_BATCHES * window.budget.rows
    room = window.room(live_workers=3)
    assert room is not None
    assert (room.rows, room.tokens, room.live_workers, room.empty_handed) == (most, 1_000_000, 3, True)

    window.hold([held_of([2] * (most - 1))])
    room = window.room(1)
    assert room is not None
    assert (room.jobs, room.rows, room.empty_handed) == (1, 1, False)
    window.hold([held_of([2])])

    assert window.room(1) is None
    window.take()
    assert window.room(1) is not None


def test_room_says_what_is_held_and_what_the_next_micro_batch_lacks(window: Window) -> None:
    def said() -> tuple[int, int]:
        room = window.room(2)
        assert room is not None
        return room.held, room.next_rows

    assert said() == (0, 4)
    window.hold([held_of([2, 2]), held_of([2])])
    assert said() == (2, 1)
    window.take()
    assert said() == (2, 4)
    # As many tokens as a micro-batch may have.
    window.hold([held_of([100])])
    assert said() == (3, 0)


def test_a_full_window_has_room_for_a_micro_batch_of_what_is_more_urgent_than_batch_rows(window: Window) -> None:
    def room() -> tuple[int, int, int] | None:
        urgent = window.urgent_room()
        return urgent and (urgent.rows, urgent.streams, urgent.returned)

    window.hold([held_of([3] * 32, claim_of(priority=Priority.BATCH))])
    assert room() == (4, 2, 2)

    window.hold([held_of([3] * 3, claim_of("2-0", priority=Priority.NORMAL))])
    assert room() == (1, 2, 2)

    window.hold([held_of([3], claim_of("3-0", priority=Priority.REALTIME))])
    assert room() == (3, 1, 1)

    window.hold([held_of([3] * 3, claim_of("4-0", priority=Priority.REALTIME))])
    assert room() is None


def test_a_job_is_large_that_is_more_than_its_class_may_save_or_than_a_window_holds(window: Window) -> None:
    window.cost.seconds_per_token = 1.0
    room = window.room(1)
    assert room is not None

    assert room.large == (SAVED_BATCHES * 4, LEAST_BATCHES * 100)


def test_no_claim_asks_for_more_jobs_than_a_script_can_take() -> None:
    window = Window(Budget(rows=9_000, tokens=1_000_000))
    room, urgent = window.room(1), window.urgent_room()
    assert room is not None
    assert urgent is not None

    assert (room.jobs, urgent.jobs, urgent.rows) == (MAX_JOBS_PER_CALL, MAX_JOBS_PER_CALL, 9_000)


def tokens_of(window: Window) -> int:
    room = window.room(1)
    assert room is not None
    return room.tokens


def test_a_window_holds_about_a_second_of_work_and_at_least_a_few_batches(window: Window) -> None:
    window.cost.seconds_per_token = 1 / 500
    assert tokens_of(window) == 500

    window.cost.seconds_per_token = 1.0
    assert tokens_of(window) == LEAST_BATCHES * window.budget.tokens
    window.hold([held_of([100]) for _ in range(LEAST_BATCHES)])
    assert window.room(1) is None


def test_a_queue_timeout_bounds_what_a_window_holds() -> None:
    window = Window(Budget(rows=4, tokens=100), queue_timeout_s=0.5)

    window.cost.seconds_per_token = 1 / 2_000
    assert tokens_of(window) == 500
    window.cost.seconds_per_token = 1.0
    assert tokens_of(window) == 100


def test_changed_limits_bind_from_the_next_micro_batch_on(window: Window) -> None:
    window.hold([held_of([5]) for _ in range(8)])

    window.limit(2, 100, None)

    assert len(window.take()) == 2


def test_a_worker_is_empty_handed_only_when_every_entry_is_settled(window: Window) -> None:
    held = held_of()
    window.keep([held.name])
    window.hold([held])
    window.complete(window.take(), ["x"])
    room = window.room(1)
    assert room is not None
    assert not room.empty_handed

    window.forget([held.name])

    room = window.room(1)
    assert room is not None
    assert room.empty_handed


def test_a_worker_is_empty_handed_only_when_the_forward_of_an_ended_job_is_over(window: Window) -> None:
    window.hold([held := held_of()])
    rows = window.take()
    window.end([held.name])
    window.forget([held.name])
    room = window.room(1)
    assert room is not None
    assert (window.empty, room.empty_handed, window.wait_until_empty(0.001)) == (False, False, False)

    empty = asleep(window, lambda: window.wait_until_empty(3 * LONG_S))
    window.complete(rows, ["x"])

    assert empty() is True
    room = window.room(1)
    assert room is not None
    assert (window.empty, room.empty_handed) == (True, True)


def test_it_is_idle_until_rows_come_and_again_when_they_are_back(window: Window) -> None:
    assert window.idle
    window.hold([held_of()])
    assert not window.idle
    rows = window.take()
    assert not window.idle
    assert not window.waiting

    window.complete(rows, ["x"])

    assert window.idle


def test_time_in_hand_counts_only_while_rows_are(window: Window) -> None:
    assert window.busy_s() == 0.0
    window.hold([held_of()])
    rows = window.take()
    assert window.busy_s() > 0.0

    window.complete(rows, ["x"])

    after = window.busy_s()
    assert window.busy_s() == after > 0.0


def test_taking_waits_for_a_job(window: Window) -> None:
    taken = asleep(window, window.take)

    window.hold([held := held_of()])

    assert [row.owner for row in cast(Rows, taken())] == [held.name]


def test_taking_ends_empty_when_the_window_is_closed_and_nothing_is_left(window: Window) -> None:
    window.hold([held_of()])
    window.close()

    assert len(window.take()) == 1
    assert window.take() == []


def test_closing_wakes_whoever_takes(window: Window) -> None:
    taken = asleep(window, window.take)

    window.close()

    assert taken() == []


@pytest.mark.parametrize("change", [Window.close, Window.take, lambda window: window.end(window.names())])
def test_a_take_or_the_end_wakes_the_claimer(window: Window, change: Callable[[Window], object]) -> None:
    window.hold([held_of([100]), held_of([100])])
    woken = asleep(window, lambda: window.wait_for_take(3 * LONG_S))

    change(window)

    assert woken() is True


def test_waiting_for_a_take_ends_after_its_time(window: Window) -> None:
    window.hold([held_of()])

    assert not window.wait_for_take(0.001)

    assert window.waiting


def test_how_long_a_forward_takes_is_foreseen_from_those_before(window: Window) -> None:
    window.hold([held_of([5]), held_of([7])])
    assert window.forward_left_s == 0.0

    window.cost.seconds_per_token = 1.0
    batch = window.take()
    # Two rows of seven tokens, and what a forward costs besides.
    assert 13.0 < window.forward_left_s - window.budget.overhead <= 14.0

    window.complete(batch, ["done"] * len(batch))
    assert window.forward_left_s == 0.0


def test_how_long_a_step_takes_is_foreseen_from_the_last_two(window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr("millstream.worker.window.time.monotonic", lambda: now)
    room = Budget(4, 1_000, packs=True)
    window.use_slots(room)
    window.hold([held_of([5])])
    rows = window.take(room, wait=False)
    left = []
    for seconds in (0.3, 0.08, 0.08):
        now += seconds
        window.complete([], [], rows, room=room)
        left.append(round(window.forward_left_s, 3))

    # Before the second step there is nothing to foresee it from.
    assert left == [0.0, 0.08, 0.08]
    now += 0.05
    assert round(window.forward_left_s, 3) == 0.03


def test_waiting_until_empty_ends_with_the_last_entry_or_its_time(window: Window) -> None:
    window.keep(["1:1-1", "1:2-2"])
    assert window.wait_until_empty(0.001) is False

    empty = asleep(window, lambda: window.wait_until_empty(3 * LONG_S))
    window.forget(["1:1-1"])
    window.forget(["1:2-2"])

    assert empty() is True


def test_a_forward_is_predicted_to_take_at_most_half_the_inference_timeout() -> None:
    window = Window(Budget(rows=64, tokens=2_048, overhead=10.0))
    window.cost.seconds_per_token = 0.001
    window.limit(64, 2_048, None, inference_timeout_s=0.1)
    window.hold([held_of([10] * 20)])

    assert len(window.take()) == (50 - 10) // 10


def test_a_batch_cut_by_its_predicted_time_says_so() -> None:
    window = Window(Budget(rows=64, tokens=2_048, overhead=10.0))
    window.cost.seconds_per_token = 0.001
    window.hold([held_of([10] * 300)])

    window.limit(64, 2_048, None, inference_timeout_s=0.1)
    window.take()
    by_time = window.cut
    window.limit(64, 400, None)
    window.take()
    by_tokens = window.cut
    window.limit(64, 2_048, None, inference_timeout_s=100.0)
    window.take()

    assert (by_time, by_tokens, window.cut) == ("time", "tokens", "rows")


def test_no_forward_is_cut_finer_than_its_fixed_cost_is_worth() -> None:
    window = Window(Budget(rows=64, tokens=2_048, overhead=100.0))
    window.cost.seconds_per_token = 0.001
    window.limit(64, 2_048, None, inference_timeout_s=0.1)
    window.hold([held_of([10] * 20)])

    assert len(window.take()) == 10


def test_rows_that_spend_their_share_are_taken_before_more_urgent_ones_the_oldest_first(window: Window) -> None:
    bulk = [held_of([3], claim_of(priority=Priority.BATCH, at=at)) for at in (3, 1, 2, 6, 5, 4)]
    urgent = held_of([3], claim_of(priority=Priority.REALTIME))
    window.hold([*bulk, urgent])

    assert window.spend_share(Priority.BATCH, 5) == 5

    taken = [{row.owner for row in window.take()} for _ in range(4)]
    assert taken[0] | taken[1] == {bulk[at].name for at in (1, 2, 0, 5, 4)}
    assert taken[2:] == [{urgent.name}, {bulk[3].name}]


def test_a_share_too_small_for_a_micro_batch_is_saved_on(window: Window) -> None:
    window.hold([held_of([3] * 6, claim_of(priority=Priority.BATCH))])

    assert window.spend_share(Priority.BATCH, 3) == 0
    assert window.spend_share(Priority.BATCH, 4) == 4
    assert window.spend_share(Priority.BATCH, 2) == 2
    assert window.waiting_of(Priority.BATCH) == 0


def test_rows_of_a_job_that_was_lost_do_not_pass_for_those_of_its_second_coming(window: Window) -> None:
    claim = claim_of(["x", "x"])
    first, second = held_of([3, 3], claim), held_of([3, 3], claim)
    window.hold([first])
    running = window.take()
    window.end([first.name])
    window.hold([second])

    late = window.complete(running, ["late", "late"])
    done = window.complete(window.take(), ["one", "two"])

    assert late == []
    assert done == [second]
    assert second.reply().values == ["one", "two"]


def test_beside_suspects_what_is_set_aside_is_in_no_stage(window: Window) -> None:
    suspect, other = (held_of([5], claim_of(attempts=1.0)) for _ in range(2))
    window.hold([held_of([3, 3])])

    with window.set_aside():
        assert window.wait_until_at_rest(0)
        taken = asleep(window, window.take)
        window.hold([suspect])
        rows = cast(Rows, taken())
        assert [row.owner for row in rows] == [suspect.name]
        window.hold([other])
        window.complete(rows, ["done"])
        window.forget([suspect.name])
        assert not window.wait_until_at_rest(0)
        rows = window.take()
        assert not window.wait_until_at_rest(0)
        window.complete(rows, ["done"])
        # Its reply is not written yet.
        assert not window.wait_until_at_rest(0)
        window.forget([other.name])
        assert window.wait_until_at_rest(0)
        waiting = asleep(window, window.take)

    assert len(cast(Rows, waiting())) == 2


@pytest.mark.parametrize(("stream", "has_room"), [(1, True), (2, True), (3, False)])
def test_suspects_have_room_beside_rows_that_are_not_more_urgent(window: Window, stream: int, has_room: bool) -> None:
    assert window.suspect_room(stream, 1) is None

    window.hold([held_of([3, 3])])

    assert bool(window.suspect_room(stream, 1)) is has_room
