"""A canary goes on while the new version is as good as the others, and is rolled back with a reason when it is not."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from millstream.broker.config.canary import CanaryPlan
from millstream.broker.config.route import RouteSpec
from millstream.broker.contract.errors import InvalidRequest, Malformed
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.contract.metrics import HISTOGRAMS, Histogram
from millstream.broker.queue.canary_judge import LEAST_CALLS, advance, begin, judge, weights_of
from millstream.broker.queue.canary_sample import LATENCY, Sample
from millstream.broker.queue.canary_state import CanaryState
from millstream.broker.queue.metrics import HistogramView, decode_metrics

PLAN = CanaryPlan(to="v2", steps=(1, 25, 100), every=10)
WEIGHTS = {"v1": 90.0, "v2": 10.0}
NOTHING = Sample.of([])


def calls(count: int, *, failed: int = 0, ms: float = 20.0, slow: int = 0, slow_ms: float = 500.0) -> Sample:
    """Calls of one row, of which `failed` failed and `slow` took `slow_ms`."""
    bounds = HISTOGRAMS[LATENCY]
    histogram = Histogram.empty(bounds).plus(np.array([ms] * (count - slow) + [slow_ms] * slow))
    return Sample(count, count, failed, HistogramView(bounds, histogram.counts.tolist(), 0.0))


def add(*samples: Sample) -> Sample:
    counts = [sum(column) for column in zip(*(each.latency.counts for each in samples), strict=True)]
    made, rows, failed = (sum(getattr(each, name) for each in samples) for name in ("calls", "rows", "failed"))
    return Sample(made, rows, failed, replace(samples[0].latency, counts=counts))


def state(plan: CanaryPlan = PLAN) -> CanaryState:
    return begin(plan, WEIGHTS, (NOTHING, NOTHING), 0, "run")


def test_under_200_calls_there_is_no_verdict_however_bad_they_are() -> None:
    bad = calls(LEAST_CALLS - 1, failed=LEAST_CALLS - 1)

    assert judge(PLAN, bad, calls(20_000), is_over=True).of == "open"
    assert advance(state(), bad, calls(20_000), 3_600_000) == state()
    assert judge(PLAN, add(bad, calls(1, failed=1)), calls(20_000), is_over=False).of == "bad"


def test_a_good_version_goes_through_its_steps_and_gets_all_calls() -> None:
    first = state()
    assert first.weights == {"v1": 99, "v2": 1}

    assert advance(first, calls(300), calls(30_000), 9_999) == first
    second = advance(first, calls(300), calls(30_000), 10_000)
    third = advance(second, calls(900), calls(32_000), 20_000)
    # All calls are the new version's: it is compared with what the others did before.
    last = advance(third, calls(2_000), calls(32_001), 30_000)

    assert (second.step, second.weights) == (1, {"v1": 75, "v2": 25})
    assert (third.step, third.weights) == (2, {"v1": 0, "v2": 100})
    assert (last.status, last.weights, last.before) == ("promoted", {"v1": 0, "v2": 100}, WEIGHTS)


def test_many_errors_end_it_before_its_window_and_say_why() -> None:
    rolled = advance(state(), calls(250, failed=50), calls(20_000, failed=20), 1_000)

    assert (rolled.status, rolled.weights) == ("rolled_back", WEIGHTS)
    assert rolled.reason == ("20.0% of its rows failed (50 of 250), and 0.1% of the others'; max_error_rate is 0.01")


def test_a_few_errors_end_it_at_the_end_of_its_window_alone() -> None:
    few = calls(250, failed=4)

    assert advance(state(), few, calls(20_000), 9_000) == state()
    assert advance(state(), few, calls(20_000), 10_000).status == "rolled_back"


def test_errors_that_all_versions_have_are_no_fault_of_the_new_one() -> None:
    assert judge(PLAN, calls(400, failed=40), calls(20_000, failed=2_000), is_over=True).of == "good"


def test_a_slow_version_ends_it_and_says_how_slow() -> None:
    rolled = advance(state(), calls(400, ms=40.0), calls(20_000, ms=20.0), 1_000)

    assert rolled.status == "rolled_back"
    assert rolled.reason.startswith("its p99 is 41 ms, 1.95 times the others' 21 ms; ")


def test_one_call_in_a_hundred_may_be_slow() -> None:
    assert judge(PLAN, calls(1_000, slow=9), calls(20_000, slow=100), is_over=True).of == "good"
    assert judge(PLAN, calls(1_000, slow=30), calls(20_000, slow=100), is_over=True).of == "bad"


def test_at_100_percent_it_is_compared_with_what_the_others_did_before() -> None:
    kept = replace(state(), step=2, others=calls(20_000, ms=20.0))

    assert advance(kept, calls(400, ms=40.0), calls(3), 1_000).status == "rolled_back"
    assert advance(replace(kept, others=None), calls(400, ms=40.0), calls(3), 10_000).status == "promoted"


def test_totals_that_began_again_begin_the_window_again() -> None:
    begun = replace(state(), new=calls(500), old=calls(500))

    again = advance(begun, calls(3, failed=3), calls(700), 20_000)

    assert (again.since, again.new, again.status, again.step) == (20_000, calls(3, failed=3), "running", 0)


def test_the_others_share_the_rest_as_they_did() -> None:
    assert weights_of({"v1": 60, "v2": 0, "v3": 30}, "v2", 10) == {"v1": 60, "v2": 10, "v3": 30}
    with pytest.raises(InvalidRequest, match="none to compare it with"):
        weights_of({"v1": 0, "v2": 5}, "v2", 10)


def test_equal_versions_are_rarely_told_apart_by_chance_however_often_one_looks() -> None:
    """Both fail for 0.5 % of the calls, and times vary by a factor of two; 600 looks each."""
    generator, rolled = random.Random(17), 0
    for _ in range(40):
        new, old = NOTHING, calls(20_000, failed=100, slow=100)
        for look in range(600):
            more = calls(5, failed=sum(generator.random() < 0.005 for _ in range(5)), ms=generator.uniform(10, 20))
            new = add(new, more)
            rolled += advance(state(), new, old, look).status == "rolled_back"

    assert rolled == 0


def test_a_sample_counts_failures_that_are_no_callers_fault_and_cancelled_rows() -> None:
    fields = {b"settled": b"9", b"ok": b"4", b"failed:model_failed": b"2", b"failed:cancelled": b"1"}
    totals = decode_metrics(ServiceKeys("s"), {**fields, b"failed:input_too_long": b"5"})

    sample = Sample.of([totals, totals])

    assert (sample.calls, sample.rows, sample.failed) == (18, 24, 6)


def test_a_state_is_read_as_it_was_written() -> None:
    written = advance(state(), calls(300), calls(30_000), 10_000)

    assert CanaryState.from_json(written.to_json()) == written
    assert len(written.to_json()) < 2_000
    for text in ("", "[]", "{}", written.to_json().replace('"calls"', '"cals"')):
        with pytest.raises(Malformed):
            CanaryState.from_json(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": []},
        {"steps": [5, 1]},
        {"steps": [0]},
        {"steps": [101]},
        {"every": 0},
        {"max_error_rate": 2},
        {"max_error_rate": True},
        {"max_p99_ratio": 0.5},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="1 validation error"):
        CanaryPlan.model_validate({"to": "v2", **wrong})


def test_a_routes_record_has_its_plan_and_its_run() -> None:
    route = RouteSpec(name="r", services={"v1": "a", "v2": "b"}, weights=WEIGHTS, canary=PLAN, canary_run="x")

    assert RouteSpec.from_json(route.to_json()) == route
    assert route.weighted({"v1": 1, "v2": 1}).canary_run == ""
