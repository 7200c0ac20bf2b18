"""How many threads the next forward runs on, by what forwards cost on each number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.worker.scheduling.thread_trials import (
    BURST,
    MOST_LOST,
    MOST_WAIT_S,
    RECENT,
    ThreadTrials,
    UsualTimes,
    rungs,
)

Cost = Callable[[int, int], float]
"""Seconds of a forward, by its tokens and threads."""

SIZES: Mapping[str, Sequence[int]] = {"growing": [16], "ever fewer": range(16, 0, -1), "with prompts": [16, 16, 528]}
"""Tokens of forwards, which repeat."""


def alone(tokens: int, threads: int) -> float:
    """Forwards whose work is divided among threads."""
    return 0.001 * (20 + tokens) / math.sqrt(threads)


def busy(tokens: int, threads: int) -> float:
    """The same forwards beside a process that has a core: more than one thread wait for each other."""
    return alone(tokens, 1) if threads == 1 else 3 * alone(tokens, 1)


class Host:
    """Runs forwards of random cost around `cost`, on the number of threads that `trials` says."""

    def __init__(self, most: int, cost: Cost, sizes: Sequence[int] = (16,), started: int | None = None) -> None:
        self.trials = ThreadTrials(most, started or most)
        self.cost = cost
        self.seconds = self.lost_s = 0.0
        self.counts: list[int] = []
        self._sizes = cycle(sizes)
        self._rng = random.Random(1)

    def run(self, forwards: int) -> int:
        """Returns the number of threads afterwards. Adds to `lost_s` what trials cost."""
        self.run_sizes([next(self._sizes) for _ in range(forwards)])
        return self.trials.settled

    def run_sizes(self, sizes: Sequence[int]) -> None:
        trials = self.trials
        for tokens in sizes:
            self.counts.append(trials.count)
            noise = self._rng.uniform(0.95, 1.05)
            seconds = noise * self.cost(tokens, trials.count)
            self.lost_s += max(0.0, seconds - noise * self.cost(tokens, trials.settled))
            self.seconds += seconds
            trials.observe(tokens, seconds)

    def until(self, threads: int, within_s: float) -> None:
        """Runs forwards until that number of threads is used."""
        began = self.seconds
        while self.run(1) != threads:
            assert self.seconds - began < within_s


def test_numbers_to_try_are_powers_of_two_and_those_halfway() -> None:
    assert [rungs(1), rungs(2), rungs(8)] == [[1], [1, 2], [1, 2, 3, 4, 6, 8]]
    assert rungs(10) == [1, 2, 3, 4, 6, 8, 10]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_process_that_gets_busy_makes_forwards_use_fewer_threads_at_once(sizes: str) -> None:
    host = Host(2, alone, SIZES[sizes])
    assert host.run(3_000) == 2

    host.cost = busy

    host.until(1, within_s=4 * RECENT * busy(max(SIZES[sizes]), 2))


@pytest.mark.parametrize("sizes", SIZES)
def test_a_core_that_becomes_free_is_found(sizes: str) -> None:
    host = Host(2, busy, SIZES[sizes])
    assert host.run(3_000) == 1

    host.cost = alone

    host.until(2, within_s=MOST_WAIT_S + 100 * alone(max(SIZES[sizes]), 1))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("cost", [alone, busy])
def test_trials_cost_little_time(sizes: str, cost: Cost) -> None:
    host = Host(2, cost, SIZES[sizes], started=2 if cost is alone else 1)

    host.run(10_000)

    assert host.trials.settled == (2 if cost is alone else 1)
    assert len(set(host.counts)) == 2
    assert host.lost_s < MOST_LOST * host.seconds + BURST * cost(max(SIZES[sizes]), host.trials.settled)


def test_a_model_whose_forwards_take_seconds_pays_no_more() -> None:
    host = Host(2, lambda tokens, threads: 100 * alone(tokens, threads))

    host.run(2_000)

    assert host.lost_s < MOST_LOST * host.seconds + BURST * host.cost(16, 2)
    assert host.lost_s > 0


def test_a_number_that_was_hopelessly_slow_is_found_when_it_is_fast_again() -> None:
    host = Host(2, lambda tokens, threads: alone(tokens, 1) * (50 if threads > 1 else 1), started=1)
    host.run(20_000)
    assert host.lost_s < MOST_LOST * host.seconds + 3 * 50 * alone(16, 1)

    host.cost = alone

    host.until(2, within_s=10 * MOST_WAIT_S)


def test_a_trial_ends_soon_if_nobody_knows_what_its_forwards_cost() -> None:
    host = Host(2, alone)
    while host.trials.count == 2:
        host.run(1)
    began = len(host.counts)

    host.run_sizes([1_000, 2_000, 4_000, 8_000])

    assert host.counts[began:] == [1, 1, 1, 2]
    assert host.trials.settled == 2


def test_many_threads_climb_down_until_none_waits_and_up_again() -> None:
    def beside(cores: int) -> Cost:
        return lambda tokens, threads: alone(tokens, threads) * (3 if threads > cores else 1)

    host = Host(16, beside(16))
    host.run(500)

    host.cost = beside(6)
    host.until(6, within_s=30)
    host.cost = beside(16)

    host.until(16, within_s=4 * MOST_WAIT_S)


def test_forwards_that_all_get_slower_keep_their_threads() -> None:
    host = Host(2, alone)
    host.run(1_000)

    host.cost = lambda tokens, threads: 2 * alone(tokens, threads)

    assert host.run(1_000) == 2
    assert host.lost_s < MOST_LOST * host.seconds


def test_a_single_slow_forward_begins_no_trial() -> None:
    host = Host(2, alone)
    host.run(400)
    before = len(host.counts)

    host.cost = lambda tokens, threads: 20 * alone(tokens, threads)
    host.run(1)
    host.cost = alone
    host.run(RECENT)

    assert set(host.counts[before:]) == {2}


def test_one_thread_needs_no_trial() -> None:
    host = Host(1, busy)

    assert host.run(100) == 1
    assert set(host.counts) == {1}


def test_the_first_forward_of_a_size_does_not_say_what_the_size_costs() -> None:
    usual = UsualTimes()

    usual.learn(100, 9.0)
    assert usual.of(100) is None
    usual.learn(100, 1.0)

    assert usual.of(100) == usual.of(103) == 1.0
    assert usual.of(200) is None


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(1, 5_000), st.floats(1e-6, 100.0)), max_size=300),
)
def test_no_more_threads_are_used_than_there_are(most: int, forwards: list[tuple[int, float]]) -> None:
    trials = ThreadTrials(most, most)

    for tokens, seconds in forwards:
        trials.observe(tokens, seconds)

        assert 1 <= trials.count <= most
        assert 1 <= trials.settled <= most
