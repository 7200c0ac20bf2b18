"""Which models of a pool are in memory: what is urgent comes, what can be spared leaves, and nothing thrashes."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from millstream.worker.scheduling.residence import LEAST_RESIDENCE_S, Memory, Standing, Swap, next_swap
from millstream.worker.scheduling.slack import NO_WORK_S

NOW = 1_000.0
LONG_AGO = 0.0


def resident(slack_s: float = NO_WORK_S, **values: object) -> Standing:
    return Standing(**{"resident": True, "slack_s": slack_s, "held": 10, "loading": 10, "since": LONG_AGO, **values})  # type: ignore[arg-type]


def standby(slack_s: float = NO_WORK_S, **values: object) -> Standing:
    return Standing(**{"resident": False, "slack_s": slack_s, "held": 10, "loading": 10, **values})  # type: ignore[arg-type]


def swap(*models: Standing, free: int | None = 0, residence_s: float | None = None) -> Swap | None:
    return next_swap(models, Memory(free, residence_s), NOW)


def test_without_a_limit_all_models_are_loaded_in_the_order_of_their_priority() -> None:
    assert swap(standby(order=2.0), standby(order=1.0), free=None) == Swap((), 1)
    assert swap(resident(), resident(), free=None) is None


def test_a_model_that_was_never_loaded_is_loaded_while_any_memory_is_free() -> None:
    assert swap(standby(held=0, loading=0), free=1) == Swap((), 0)
    assert swap(standby(held=0, loading=0), resident(), free=0) is None


def test_a_model_without_jobs_makes_nobody_leave() -> None:
    assert swap(standby(), resident(), free=9) is None
    assert swap(standby(), resident(), free=11) == Swap((), 0)


def test_jobs_come_before_models_that_are_loaded_in_advance() -> None:
    assert swap(standby(order=0.0), standby(5.0, order=9.0), free=100) == Swap((), 1)


def test_the_model_whose_jobs_may_wait_least_is_loaded_first() -> None:
    assert swap(standby(5.0), standby(1.0), standby(3.0), free=100) == Swap((), 1)


def test_a_model_without_jobs_leaves_for_one_with_jobs_however_long_they_may_wait() -> None:
    assert swap(standby(50.0), resident(5.0), resident(NO_WORK_S), free=5) == Swap([2], 0)


def test_no_more_leave_than_are_needed_and_first_those_that_were_idle_longest() -> None:
    idle = resident(since=100.0)

    assert swap(standby(5.0), idle, resident(since=50.0), resident(since=80.0)) == Swap([2, 3], 0)
    assert swap(standby(5.0), idle, resident(since=50.0), resident(since=80.0), free=1) == Swap([2], 0)


def test_a_model_with_jobs_leaves_only_for_one_that_is_about_to_be_late_and_may_wait_less() -> None:
    assert swap(standby(1.5, load_s=1.0), resident(5.0)) is None
    assert swap(standby(0.5, load_s=1.0), resident(5.0)) == Swap([1], 0)
    assert swap(standby(0.5, load_s=1.0), resident(0.1)) is None


def test_of_late_models_the_more_urgent_one_comes_and_equal_ones_take_turns() -> None:
    late = resident(-100.0, rank=1)

    assert swap(standby(-1.0, rank=0), late) == Swap([1], 0)
    assert swap(standby(-1.0, rank=1), late) == Swap([1], 0)
    assert swap(standby(-1.0, rank=2), late) is None
    assert swap(standby(-1.0, rank=1, order=2.0), resident(-1.0, rank=1, order=1.0)) is None


def test_a_model_stays_for_the_minimum_residence_whoever_wants_its_memory() -> None:
    young = resident(since=NOW - 3.0)

    assert swap(standby(-1.0), young, residence_s=4.0) is None
    assert swap(standby(-1.0), young, residence_s=2.0) == Swap([1], 0)
    assert swap(standby(-1.0), resident(since=NOW), residence_s=0.0) == Swap([1], 0)


def test_the_default_residence_grows_with_the_time_of_a_load() -> None:
    for load_s, long_enough_s in ((0.0, LEAST_RESIDENCE_S), (1.0, 5.0), (20.0, 100.0)):
        wanted = standby(-1.0, load_s=load_s)

        assert swap(wanted, resident(since=NOW - long_enough_s + 0.1)) is None
        assert swap(wanted, resident(since=NOW - long_enough_s - 0.1)) == Swap([1], 0)


def test_a_less_urgent_model_does_not_take_the_memory_that_a_more_urgent_one_waits_for() -> None:
    young = resident(since=NOW)

    assert swap(standby(1.0, held=30, loading=30), standby(2.0, held=5, loading=5), young, free=20) is None


def test_a_model_that_is_kept_comes_first_and_never_leaves() -> None:
    assert swap(standby(-1.0), resident(keep=True)) is None
    assert swap(standby(-1.0), standby(keep=True), free=11) == Swap((), 1)
    assert swap(standby(keep=True), resident(-1.0)) == Swap([1], 0)


def test_a_model_whose_load_failed_waits_for_its_next_try() -> None:
    assert swap(standby(-1.0, blocked=True), resident()) is None
    assert swap(standby(-1.0, blocked=True), standby(5.0), free=11) == Swap((), 1)


def test_loading_may_need_more_memory_than_being_there() -> None:
    assert swap(standby(1.0, loading=25), resident(), resident(), free=10) == Swap([1, 2], 0)


def test_a_model_is_tried_alone_if_even_then_it_may_not_fit() -> None:
    assert swap(standby(1.0, loading=500), resident(), free=10) == Swap([1], 0)
    assert swap(standby(1.0, loading=500), free=10) == Swap([], 0)


def test_if_the_limit_is_exceeded_the_model_that_can_be_spared_leaves_but_not_the_last_one() -> None:
    assert swap(resident(1.0), resident(5.0), free=-1) == Swap((1,), None)
    assert swap(resident(1.0), resident(5.0, keep=True), free=-1) == Swap((0,), None)
    assert swap(resident(1.0), free=-1) is None
    assert swap(resident(1.0, keep=True), resident(5.0, keep=True), free=-1) is None
    # However short it was there, and whatever waits.
    assert swap(resident(1.0, since=NOW), resident(5.0, since=NOW), standby(-1.0), free=-1) == Swap((1,), None)


models = st.builds(
    Standing,
    resident=st.booleans(),
    slack_s=st.one_of(st.just(NO_WORK_S), st.floats(-10, 10)),
    rank=st.integers(0, 2),
    order=st.integers(0, 2).map(float),
    held=st.integers(0, 30),
    loading=st.integers(0, 40),
    load_s=st.floats(0, 3),
    since=st.floats(NOW - 20, NOW),
    keep=st.booleans(),
    blocked=st.booleans(),
)


@given(st.lists(models, min_size=1, max_size=6), st.one_of(st.none(), st.integers(-20, 60)), st.floats(0, 10))
def test_every_change_is_allowed(standings: Sequence[Standing], free: int | None, residence_s: float) -> None:
    change = next_swap(standings, Memory(free, residence_s), NOW)

    if change is None:
        return
    assert change.load is not None or change.evict
    for at in change.evict:
        assert standings[at].resident
        assert not standings[at].keep
        assert free is not None
        assert free < 0 or NOW - standings[at].since >= residence_s
    if change.load is not None:
        wanted = standings[change.load]
        assert not wanted.resident
        assert not wanted.blocked
        left = [each for at, each in enumerate(standings) if each.resident and at not in change.evict]
        room = None if free is None else free + sum(standings[at].held for at in change.evict)
        assert room is None or room > wanted.loading or not left


@given(st.integers(2, 4), st.floats(0.1, 3.0), st.floats(0.5, 20.0))
def test_models_that_all_have_late_jobs_and_room_for_one_swap_at_most_once_a_residence(
    count: int, load_s: float, residence_s: float
) -> None:
    """Every model always has late jobs, and one fits: loads take turns, and each model gets its own."""
    since, now, there = [0.0] * count, 0.0, -1
    loads = [0] * count
    for _ in range(400):
        standings = [
            Standing(at == there, -1.0, 1, held=10, loading=10, load_s=load_s, since=since[at]) for at in range(count)
        ]
        change = next_swap(standings, Memory(0 if there >= 0 else 10, residence_s), now)
        if change and change.load is not None:
            now += load_s
            there = change.load
            since[there] = now
            loads[there] += 1
        now += 0.25
    assert sum(loads) <= 1 + now / (residence_s + load_s)
