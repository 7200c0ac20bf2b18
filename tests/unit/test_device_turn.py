"""Which lane gets the device: the one whose jobs may wait least, and late ones by urgency, each in bounded time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.job import PRIORITIES
from millstream.worker.scheduling.device_turn import WAIT_FACTOR, DeviceTurn, Work

URGENT, NORMAL, BATCH = range(len(PRIORITIES))
LATE_S = -1.0


def late(*ranks: int) -> list[Work]:
    return [Work(rank, LATE_S) for rank in ranks]


def in_time(*slacks: float) -> list[Work]:
    return [Work(NORMAL, slack) for slack in slacks]


def turns(works: Sequence[Work], lengths: Sequence[float], seconds: float) -> list[tuple[int, float]]:
    """Each turn's lane and start, if all lanes always have this work, and turns of these lengths."""
    turn, now, found = DeviceTurn(len(works)), 0.0, []
    while now < seconds:
        place = turn.next(works, now)
        assert place is not None
        found.append((place, now))
        now += lengths[place]
        turn.end(place, lengths[place], now)
    return found


def test_without_work_nobody_gets_the_device() -> None:
    turn = DeviceTurn(3)

    assert turn.next([None, None, None], 0.0) is None
    assert turn.next([None, *late(BATCH), None], 1.0) == 1


def test_the_lane_with_the_least_slack_comes_first_wherever_it_stands_and_whatever_its_class() -> None:
    for place in range(3):
        works = [Work(URGENT, 5.0)] * 3
        works[place] = Work(BATCH, 2.0)

        assert DeviceTurn(3).next(works, 1.0) == place


def test_a_late_lane_comes_before_all_that_are_in_time() -> None:
    assert DeviceTurn(2).next([*in_time(0.5), *late(BATCH)], 0.0) == 1


def test_a_lane_is_late_if_a_turn_of_another_one_would_make_it_late() -> None:
    turn = DeviceTurn(2)
    turn.end(1, 0.4, 0.0)

    assert turn.next([Work(URGENT, 0.5), *late(BATCH)], 1.0) == 1
    assert turn.next([Work(URGENT, 0.3), *late(BATCH)], 1.0) == 0
    # The turns of a lane without work make nobody late.
    assert turn.next([Work(URGENT, 0.3), None], 1.0) == 0


def test_the_most_urgent_late_lane_comes_first_wherever_it_stands() -> None:
    for place in range(3):
        turn = DeviceTurn(3)
        for each in range(3):
            turn.end(each, 1.0, 0.0)
        works = late(NORMAL, NORMAL, NORMAL)
        works[place] = Work(URGENT, LATE_S)

        assert turn.next(works, 1.0) == place


def test_the_order_of_models_decides_between_late_lanes_of_one_class_only() -> None:
    assert DeviceTurn(2).next([Work(NORMAL, LATE_S, 2.0), Work(NORMAL, LATE_S, 1.0)], 0.0) == 1
    assert DeviceTurn(2).next([Work(URGENT, LATE_S, 2.0), Work(NORMAL, LATE_S, 1.0)], 0.0) == 0
    assert DeviceTurn(2).next([Work(NORMAL, 1.0, 2.0), Work(NORMAL, 2.0, 1.0)], 0.0) == 0


def test_late_lanes_of_one_class_take_turns_however_late_they_are() -> None:
    works = [Work(NORMAL, -100.0), Work(NORMAL, -1.0), Work(NORMAL, -10.0)]
    order = [place for place, _ in turns(works, [1.0] * 3, 30.0)]

    assert all(set(order[at : at + 3]) == {0, 1, 2} for at in range(0, len(order) - 3))


def test_a_lane_that_had_no_work_does_not_count_as_waiting() -> None:
    turn = DeviceTurn(2)
    turn.next(late(URGENT, BATCH), 0.0)
    turn.end(1, 1.0, 1.0)
    assert turn.next([*late(URGENT), None], 100.0) == 0

    assert turn.next(late(URGENT, BATCH), 101.0) == 0
    turn.end(0, 5.0, 106.0)
    assert turn.next(late(URGENT, BATCH), 106.0) == 0
    turn.end(0, 5.0, 111.0)
    assert turn.next(late(URGENT, BATCH), 111.0) == 1


def test_a_late_lane_with_less_urgent_jobs_gets_about_a_tenth_of_the_time() -> None:
    for length in (0.01, 0.1, 1.0):
        order = turns(late(URGENT, BATCH), [0.01, length], 200.0)

        part = sum(length for place, _ in order if place == 1) / 200.0
        assert 0.08 < part < 0.12, length


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.floats(0.001, 2.0, allow_nan=False)),
        min_size=2,
        max_size=5,
    )
)
def test_no_late_lane_starves(lanes: list[tuple[int, float]]) -> None:
    works, lengths = late(*(each for each, _ in lanes)), [each for _, each in lanes]

    order = turns(works, lengths, 100.0)

    for place, length in enumerate(lengths):
        starts = [at for served, at in order if served == place]
        # Until it is due; then the running turn, and one turn of each other lane.
        most = (WAIT_FACTOR + 1) * length + max(lengths) + sum(lengths) + 1e-6
        assert all(after - before <= most for before, after in pairwise(starts))
        assert starts[0] <= max(lengths) + sum(lengths) + 1e-6


@given(
    st.lists(st.tuples(st.floats(0.01, 0.2), st.floats(0.0, 2.0)), min_size=2, max_size=4),
)
def test_lanes_whose_jobs_fit_before_they_are_due_are_never_late(lanes: list[tuple[float, float]]) -> None:
    """Each lane gets a job every period; its turn may be delayed by one turn of another lane, which has begun."""
    lengths = [length for length, _ in lanes]
    longest = max(lengths)
    # The device is half idle, and every period has room for all turns and for one that has begun before.
    periods = [2 * len(lanes) * longest + spare for _, spare in lanes]
    turn, now = DeviceTurn(len(lanes)), 0.0
    due = list(periods)
    at = [0.0] * len(lanes)
    for _ in range(60):
        works = [
            Work(NORMAL, due[place] - now - lengths[place]) if at[place] <= now else None for place in range(len(lanes))
        ]
        place = turn.next(works, now)
        if place is None:
            now = min(at)
            continue
        now += lengths[place]
        turn.end(place, lengths[place], now)
        assert now <= due[place] + 1e-9
        at[place] += periods[place]
        due[place] = at[place] + periods[place]


@given(
    st.lists(
        st.one_of(st.none(), st.builds(Work, st.integers(0, 2), st.floats(-5, 5), st.integers(0, 3))),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 20),
)
def test_the_device_is_never_idle_beside_work_and_never_given_to_a_lane_without(
    works: list[Work | None], before: int
) -> None:
    turn = DeviceTurn(len(works))
    for number in range(before):
        turn.end(number % len(works), 0.1, number * 0.1)

    chosen = turn.next(works, before * 0.1)

    assert (chosen is None) == (set(works) == {None})
    assert chosen is None or works[chosen] is not None
