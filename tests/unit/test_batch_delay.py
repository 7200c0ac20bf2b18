"""An idle model waits for company that is likely, never for company that cannot come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millstream.worker.scheduling.batch_delay import HALF_LIFE_S, BatchDelay

seconds = st.floats(0, 5, allow_nan=False)


def test_a_lone_caller_never_waits_whatever_the_batch_timeout() -> None:
    batch_delay = BatchDelay(1.0)

    for _ in range(1_000):
        assert batch_delay.wait_s(0.0) == 0.0
        batch_delay.observe(0, 0.02)


def test_steady_company_is_waited_for() -> None:
    batch_delay = BatchDelay(0.05)

    batch_delay.observe(100, 1.0)

    assert 0.01 < batch_delay.wait_s(0.0) <= 0.05


def test_company_that_comes_too_seldom_is_not_waited_for() -> None:
    batch_delay = BatchDelay(0.05)

    batch_delay.observe(5, 1.0)

    assert batch_delay.wait_s(0.0) == 0.0


def test_one_waits_no_longer_than_twice_what_is_usual() -> None:
    batch_delay = BatchDelay(1.0)

    batch_delay.observe(1_000, 1.0)

    assert batch_delay.wait_s(0.0) <= 0.002


def test_a_single_chance_arrival_long_ago_is_forgotten() -> None:
    batch_delay = BatchDelay(1.0)
    batch_delay.observe(1, 0.01)
    assert batch_delay.wait_s(0.0) > 0

    batch_delay.observe(0, 2 * HALF_LIFE_S)

    assert batch_delay.wait_s(0.0) == 0.0


def test_steady_company_that_ends_is_forgotten() -> None:
    batch_delay = BatchDelay(0.05)
    batch_delay.observe(200, 1.0)

    for _ in range(20):
        batch_delay.observe(0, HALF_LIFE_S)

    assert batch_delay.wait_s(0.0) == 0.0


@given(st.floats(0, 2), st.lists(st.tuples(st.integers(0, 100), seconds), max_size=20), seconds)
def test_nobody_waits_past_the_batch_timeout(
    batch_timeout_s: float, history: list[tuple[int, float]], since_first_s: float
) -> None:
    batch_delay = BatchDelay(batch_timeout_s)
    for arrivals, busy_s in history:
        batch_delay.observe(arrivals, busy_s)

    wait_s = batch_delay.wait_s(since_first_s)

    assert wait_s == 0.0 or 0.0 < since_first_s + wait_s <= batch_timeout_s + 1e-9
