"""The limit of a server's requests: found without a number in a file, shared, and kept when nothing changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.slots import Demand
from millstream.worker.scheduling.upstream_limit import (
    CUT_MS,
    MOST,
    START,
    STEP_MS,
    Backoff,
    Delays,
    Limit,
    Signals,
    allowed,
    next_limit,
    parts,
)

FULL = {"a": Demand(2, 2), "b": Demand(2, 2)}
IDLE = {"a": Demand(0, 0)}


def simulate(capacity: list[int], seconds_each: int) -> list[int]:
    """The limit at each tenth of a second, against a server that refuses what is above its capacity."""
    limit, seen, now = Limit(changed_at=1), [], 1
    for each in capacity:
        for _ in range(10 * seconds_each):
            now += 100
            over = max(0, limit.requests - each)
            signals = Signals(begun=limit.requests, refused=over, refused_at=now if over else 0)
            running = min(limit.requests, each)
            limit = next_limit(limit, signals, {"a": Demand(running, running)}, now)
            seen.append(limit.requests)
    return seen


@pytest.mark.parametrize("capacity", [1, 2, 4, 12, 60, 300])
def test_a_hidden_limit_is_found_in_half_a_minute_and_hardly_left(capacity: int) -> None:
    seen = simulate([capacity], 90)[300:]

    close = [each for each in seen if 0.8 * capacity <= each <= max(1.2 * capacity, capacity + 1)]
    assert len(close) > 0.95 * len(seen)
    assert sum(each > capacity for each in seen) < 0.1 * len(seen)


@pytest.mark.parametrize(("before", "after"), [(4, 12), (12, 4), (100, 10)])
def test_a_limit_that_changes_is_found_again_in_half_a_minute(before: int, after: int) -> None:
    seen = simulate([before, after], 60)[900:]

    assert 0.8 * after <= sum(seen) / len(seen) <= 1.2 * after


def test_an_unused_limit_does_not_grow() -> None:
    limit = Limit(changed_at=1)

    assert next_limit(limit, Signals(), IDLE, 10_000_000) == limit


def test_requests_that_began_before_a_step_down_cause_no_second_one() -> None:
    limit = Limit(requests=8, changed_at=1_000, has_met=True)

    assert next_limit(limit, Signals(begun=1, refused=1, refused_at=999), FULL, 1_000 + 2 * CUT_MS) == limit


def test_a_refused_step_up_goes_back_to_the_proven_limit_and_holds_nothing() -> None:
    limit = next_limit(Limit(requests=4, changed_at=1, has_met=True), Signals(), FULL, STEP_MS + 1)
    assert (limit.requests, limit.proven) == (5, 4)

    back = next_limit(limit, Signals(begun=5, refused=1, refused_at=STEP_MS + 2, retry_ms=9_000), FULL, STEP_MS + 3)

    assert (back.requests, back.held_until) == (4, 0)
    assert back.step_ms > limit.step_ms


def test_a_server_that_refuses_what_it_could_do_before_is_left_alone_as_long_as_it_says() -> None:
    limit = Limit(requests=4, changed_at=1, has_met=True)

    cut = next_limit(limit, Signals(begun=4, refused=4, refused_at=600, retry_ms=7_000), {"a": Demand(0, 4)}, 700)

    assert (cut.requests, cut.held_until) == (2, 7_700)
    assert allowed(cut, "a", {"a": Demand(0, 4)}, 7_699) == 0
    assert allowed(cut, "a", {"a": Demand(0, 4)}, 7_700) == 2


def test_a_queue_inside_the_server_lowers_the_limit_and_never_below_the_first_one() -> None:
    limit = Limit(requests=20, changed_at=1)
    now = 1
    for _ in range(100):
        now += 1_000
        limit = next_limit(limit, Signals(queues=True), FULL, now)

    assert limit.requests == START


@given(st.dictionaries(st.text("abc", min_size=1), st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_parts_together_are_the_limit_and_none_starves(demands: dict[str, tuple[int, int]]) -> None:
    workers = {name: Demand(*each) for name, each in demands.items()}
    totals = dict.fromkeys(workers, 0)
    for turn in range(len(workers)):
        given_out = parts(6, workers, turn * 1_000)
        assert sum(given_out.values()) == 6
        totals = {name: totals[name] + given_out[name] for name in workers}

    assert all(totals.values()) or len(workers) > 6


def test_slots_move_to_the_worker_that_needs_them_once_the_other_has_ended_its_requests() -> None:
    limit = Limit(requests=4, changed_at=1)
    workers = {"a": Demand(4, 4), "b": Demand(0, 4)}

    assert allowed(limit, "a", workers, 0) == 2
    assert allowed(limit, "b", workers, 0) == 0
    assert allowed(limit, "b", {"a": Demand(2, 4), "b": Demand(0, 4)}, 0) == 2


@given(st.builds(Limit, st.integers(1, MOST), *[st.integers(0, 10**12)] * 5, st.booleans()))
def test_a_limit_survives_its_way_through_the_server(limit: Limit) -> None:
    assert Limit.read(limit.text()) == limit


@pytest.mark.parametrize("text", ["", "x", "1 2", "0 0 0 0 0 0 0", "9999999 0 0 0 0 0 0", "1 2 3 4 5 6 7 8"])
def test_a_state_that_cannot_be_read_is_the_first_one(text: str) -> None:
    assert Limit.read(text) == Limit()


@given(
    st.builds(Limit, st.integers(1, MOST), *[st.integers(0, 10**6)] * 5, st.booleans()),
    st.builds(Signals, *[st.integers(0, 100)] * 2, st.integers(0, 10**6), st.integers(0, 10**9), st.booleans()),
    st.integers(0, 10**6),
)
def test_no_step_leaves_the_bounds_or_holds_for_ever(limit: Limit, signals: Signals, now: int) -> None:
    after = next_limit(limit, signals, FULL, now)

    assert 1 <= after.requests <= MOST
    assert after.held_until <= max(limit.held_until, now + 60_000)


def test_one_slow_answer_is_no_queue_and_all_slow_ones_are() -> None:
    delays, now = Delays(), 0.0
    heard: list[bool] = []
    for seconds in [0.1] * 30 + [0.1, 5.0, 9.0] * 10 + [1.0] * 30:
        now += 0.1
        heard.append(delays.observe(seconds, now))

    assert not any(heard[:60])
    assert any(heard[60:])


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_success() -> None:
    backoff = Backoff(1.0, 5.0)

    assert [backoff.fail(0.0) for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]
    assert backoff.fail(0.0, least_s=9.0) == 9.0
    backoff.succeed()
    assert (backoff.until, backoff.fail(10.0), backoff.until) == (0.0, 1.0, 11.0)
