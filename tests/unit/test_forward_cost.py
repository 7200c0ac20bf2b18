"""The predicted time of a forward, as the worker that waits for its end needs it."""

import pytest

from millstream.worker.forward_cost import ForwardCost
from millstream.worker.scheduling.batcher import Budget

FULL = 2_048


@pytest.fixture
def cost() -> ForwardCost:
    """As measured at a start: 0.1 s for a full forward."""
    cost = ForwardCost(Budget(rows=64, tokens=FULL, overhead=52))
    cost.calibrate(0.1 / (FULL + 52), overhead=52, smallest_s=0.003)
    return cost


def test_small_forwards_do_not_change_what_a_full_one_is_predicted_to_take(cost: ForwardCost) -> None:
    for _ in range(50):
        cost.observe(8, 0.009)

    assert cost.predicted_s(FULL) == pytest.approx(0.1, rel=0.2)
    assert cost.predicted_s(8) == pytest.approx(0.009, rel=0.01)


def test_full_forwards_that_become_slower_are_predicted_slower_after_a_few_of_them(cost: ForwardCost) -> None:
    for _ in range(10):
        cost.observe(FULL, 0.3)

    assert cost.predicted_s(FULL) == pytest.approx(0.3, rel=0.1)
    assert cost.seconds_per_token * (FULL + 52) == pytest.approx(0.3, rel=0.1)


def test_a_cost_that_was_not_measured_at_the_start_comes_from_the_first_forward() -> None:
    cost = ForwardCost(Budget(rows=64, tokens=FULL, overhead=0))
    assert cost.predicted_s(100) == 0.0

    cost.observe(100, 0.2)

    assert cost.predicted_s(100) == pytest.approx(0.2)
    assert cost.tokens_in(1.0) == 500
