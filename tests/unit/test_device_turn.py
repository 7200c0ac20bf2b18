"""Which lane gets the device: the most urgent one, and each one in bounded time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.job import PRIORITIES
from millstream.worker.scheduling.device_turn import WAIT_FACTOR, DeviceTurn

URGENT, NORMAL, BATCH = range(len(PRIORITIES))


def turns(urgencies: Sequence[int], lengths: Sequence[float], seconds: float) -> list[tuple[int, float]]:
    """Each turn's lane and start, if all lanes always have work of these urgencies, and turns of these lengths."""
    turn, now, found = DeviceTurn(len(urgencies)), 0.0, []
    while now < seconds:
        place = turn.next(urgencies, now)
        assert place is not None
        found.append((place, now))
        now += lengths[place]
        turn.end(place, lengths[place], now)
    return found


def test_without_work_nobody_gets_the_device() -> None:
    turn = DeviceTurn(3)

    assert turn.next([None, None, None], 0.0) is None
    assert turn.next([None, BATCH, None], 1.0) == 1


def test_the_most_urgent_lane_comes_first_wherever_it_stands() -> None:
    for place in range(3):
        turn = DeviceTurn(3)
        for each in range(3):
            turn.end(each, 1.0, 0.0)
        urgencies: list[int | None] = [NORMAL] * 3
        urgencies[place] = URGENT

        assert turn.next(urgencies, 1.0) == place


def test_lanes_of_one_urgency_take_turns() -> None:
    order = [place for place, _ in turns([NORMAL] * 3, [1.0] * 3, 30.0)]

    assert all(set(order[at : at + 3]) == {0, 1, 2} for at in range(0, len(order) - 3))


def test_a_lane_that_had_no_work_does_not_count_as_waiting() -> None:
    turn = DeviceTurn(2)
    turn.next([URGENT, BATCH], 0.0)
    turn.end(1, 1.0, 1.0)
    assert turn.next([URGENT, None], 100.0) == 0

    assert turn.next([URGENT, BATCH], 101.0) == 0
    turn.end(0, 5.0, 106.0)
    assert turn.next([URGENT, BATCH], 106.0) == 0
    turn.end(0, 5.0, 111.0)
    assert turn.next([URGENT, BATCH], 111.0) == 1


def test_a_less_urgent_lane_gets_about_a_tenth_of_the_time() -> None:
    for length in (0.01, 0.1, 1.0):
        order = turns([URGENT, BATCH], [0.01, length], 200.0)

        part = sum(length for place, _ in order if place == 1) / 200.0
        assert 0.08 < part < 0.12, length


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.floats(0.001, 2.0, allow_nan=False)),
        min_size=2,
        max_size=5,
    )
)
def test_no_lane_starves(lanes: list[tuple[int, float]]) -> None:
    urgencies, lengths = [each for each, _ in lanes], [each for _, each in lanes]

    order = turns(urgencies, lengths, 100.0)

    for place, length in enumerate(lengths):
        starts = [at for served, at in order if served == place]
        # Until it is due; then the running turn, and one turn of each other lane.
        most = (WAIT_FACTOR + 1) * length + max(lengths) + sum(lengths) + 1e-6
        assert all(after - before <= most for before, after in pairwise(starts))
        assert starts[0] <= max(lengths) + sum(lengths) + 1e-6


@given(st.lists(st.one_of(st.none(), st.integers(0, 2)), min_size=1, max_size=5), st.integers(0, 20))
def test_the_device_is_never_idle_beside_work_and_never_given_to_a_lane_without(
    urgencies: list[int | None], before: int
) -> None:
    turn = DeviceTurn(len(urgencies))
    for number in range(before):
        turn.end(number % len(urgencies), 0.1, number * 0.1)

    chosen = turn.next(urgencies, before * 0.1)

    assert (chosen is None) == (set(urgencies) == {None})
    assert chosen is None or urgencies[chosen] is not None
