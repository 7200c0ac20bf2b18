"""Classes that wait get their share of the rows, whatever saturates the workers, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from contracts.held import claim_of

from millstream.broker.config.spec import Runtime
from millstream.broker.contract.job import PRIORITIES, Claim, Priority
from millstream.worker.scheduling.fair_share import FairShare

REALTIME, NORMAL, BATCH = PRIORITIES
SHARES = {REALTIME: 0.7, NORMAL: 0.2, BATCH: 0.1}
EVERYBODY = (1_000, 1_000, 1_000)


def rows(priority: Priority, count: int) -> list[Claim]:
    return [claim_of(priority=priority) for _ in range(count)]


def served(fair_share: FairShare, window: int, claims: int) -> Mapping[Priority, int]:
    """What a backlog of all three gets in so many claims of `window` one-row jobs."""
    total = dict.fromkeys(PRIORITIES, 0)
    for _ in range(claims):
        normal, batch = fair_share.saved()
        taken = {NORMAL: min(normal, window), BATCH: min(batch, window - min(normal, window))}
        taken[REALTIME] = window - taken[NORMAL] - taken[BATCH]
        for each in PRIORITIES:
            total[each] += taken[each]
        fair_share.record([claim for each in PRIORITIES for claim in rows(each, taken[each])], EVERYBODY)
    return total


@pytest.mark.parametrize("window", [1, 7, 64])
def test_each_class_that_waits_gets_its_share(window: int) -> None:
    total = served(FairShare(SHARES, most_rows=128), window, claims=600)

    for priority, share in SHARES.items():
        assert total[priority] / sum(total.values()) == pytest.approx(share, abs=0.02)


def test_a_class_that_does_not_wait_saves_nothing() -> None:
    fair_share = FairShare(SHARES, most_rows=128)

    fair_share.record(rows(REALTIME, 100), (500, 0, 10))

    assert fair_share.saved() == (0, 10)


def test_what_a_class_is_served_anyway_counts() -> None:
    fair_share = FairShare(SHARES, most_rows=128)

    fair_share.record(rows(REALTIME, 50) + rows(NORMAL, 50), EVERYBODY)

    assert fair_share.saved() == (0, 10)


def test_savings_are_bounded() -> None:
    fair_share = FairShare(SHARES, most_rows=16)

    fair_share.record(rows(REALTIME, 1_000), EVERYBODY)

    assert fair_share.saved() == (16, 16)


def test_weights_of_the_configuration_are_parts_of_one() -> None:
    runtime = Runtime.model_validate(
        {"priorities": {"batch": {"share": 3}, "normal": {"share": 3}, "realtime": {"share": 4}}}
    )

    assert runtime.shares == {"realtime": 0.4, "normal": 0.3, "batch": 0.3}
    assert sum(Runtime().shares.values()) == pytest.approx(1)


def test_a_priority_has_its_own_limits_where_given_and_the_services_otherwise() -> None:
    runtime = Runtime.model_validate(
        {
            "queue_timeout": 1,
            "total_timeout": 9,
            "priorities": {"realtime": {"queue_timeout": 0.2, "batch_timeout": 0.001}},
        }
    )

    realtime, normal, batch = (runtime.limits(each.value) for each in PRIORITIES)
    assert (realtime.queue_timeout, realtime.total_timeout, realtime.batch_timeout) == (0.2, 9, 0.001)
    assert (normal.queue_timeout, normal.batch_timeout) == (1, runtime.batch_timeout)
    assert batch.queue_timeout is None


def test_what_was_claimed_before_and_runs_by_its_share_is_spent() -> None:
    fair_share = FairShare(SHARES, most_rows=128)
    fair_share.record(rows(REALTIME, 500), EVERYBODY)
    assert fair_share.saved() == (100, 50)

    fair_share.charge(BATCH, 40)

    assert fair_share.saved() == (100, 14)
