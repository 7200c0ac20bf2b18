"""Batches fit their budget, lose nothing, keep the urgent first and pad little."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.worker.scheduling.batcher import Budget, Pool, Row

Rows = list[Row[None]]


def row(tokens: int, urgency: tuple[int, ...] = (1, 0), owner: str = "job", index: int = 0) -> Row[None]:
    return Row(tokens, urgency, owner, index, None)


rows = st.lists(
    st.builds(row, st.integers(1, 600), st.tuples(*map(st.integers, (0, 0, 0), (2, 9, 9))), st.sampled_from("abc")),
    max_size=60,
)
budgets = st.builds(
    Budget, rows=st.integers(1, 20), tokens=st.integers(1, 2_000), overhead=st.floats(0, 2_000), packs=st.booleans()
)


def pool_of(waiting: Rows) -> Pool[None]:
    pool: Pool[None] = Pool()
    pool.add(waiting)
    return pool


def drained(pool: Pool[None], budget: Budget) -> list[Rows]:
    batches = []
    while batch := pool.take(budget):
        batches.append(batch)
    return batches


def identities(batches: list[Rows]) -> list[int]:
    return sorted(id(each) for batch in batches for each in batch)


@given(rows, budgets)
def test_batches_fit_the_budget_and_lose_nothing(waiting: Rows, budget: Budget) -> None:
    batches = drained(pool_of(waiting), budget)

    assert identities(batches) == identities([waiting])
    assert all(len(batch) <= budget.rows for batch in batches)
    assert all(budget.computed(batch) <= budget.tokens for batch in batches if len(batch) > 1)


@given(rows, budgets)
def test_each_batch_holds_the_most_urgent_row_of_those_that_wait(waiting: Rows, budget: Budget) -> None:
    pool = pool_of(waiting)
    left = list(waiting)

    while batch := pool.take(budget):
        assert min(each.urgency for each in batch) == min(each.urgency for each in left)
        left = [each for each in left if each not in batch]


@given(rows, rows, budgets, st.sets(st.sampled_from("abc")))
def test_what_is_dropped_is_never_taken_and_nothing_else_is(
    waiting: Rows, later: Rows, budget: Budget, owners: set[str]
) -> None:
    pool = pool_of(waiting)
    taken = pool.take(budget)

    dropped = pool.drop(owners)
    pool.add(later)
    batches = drained(pool, budget)

    assert all(each.owner in owners for each in dropped)
    assert all(each.owner not in owners for batch in batches for each in batch if each not in later)
    assert identities([taken, dropped, *batches]) == identities([waiting, later])


@given(rows, rows, budgets)
def test_the_pool_counts_its_rows_and_tokens(waiting: Rows, later: Rows, budget: Budget) -> None:
    pool = pool_of(waiting)
    taken = pool.take(budget)
    pool.add(later)

    assert len(pool) == len(waiting) + len(later) - len(taken)
    assert pool.tokens == sum(each.tokens for each in waiting + later) - sum(each.tokens for each in taken)
    drained(pool, budget)
    assert (len(pool), pool.tokens) == (0, 0)


def test_one_over_long_row_goes_alone() -> None:
    pool = pool_of([row(50), row(5_000, urgency=(0, 0)), row(50)])

    batches = drained(pool, Budget(rows=64, tokens=2_048))

    assert [[each.tokens for each in batch] for batch in batches] == [[5_000], [50, 50]]


def test_an_empty_pool_gives_an_empty_batch() -> None:
    assert pool_of([]).take(Budget(rows=8, tokens=100)) == []
    assert pool_of([]).choose(Budget(rows=8, tokens=100, packs=True)) == []


@pytest.mark.parametrize("budget", [Budget(rows=64, tokens=1_000_000), Budget(rows=1_000, tokens=2_048)])
def test_rows_of_one_length_fill_the_budget_exactly(budget: Budget) -> None:
    batches = drained(pool_of([row(32) for _ in range(256)]), budget)

    assert [len(batch) for batch in batches] == [64] * 4


@pytest.mark.parametrize(
    ("lengths", "budget", "cut"),
    [
        ([32] * 9, Budget(rows=8, tokens=1_000), "rows"),
        ([32] * 9, Budget(rows=64, tokens=256), "tokens"),
        ([3_000, 2_900], Budget(rows=64, tokens=2_048), "tokens"),
        ([8, 8, 8, 500], Budget(rows=64, tokens=10_000, overhead=1.0), "padding"),
        ([32] * 8, Budget(rows=8, tokens=256), "arrival"),
        ([5], Budget(rows=8, tokens=256), "arrival"),
        ([9, 30, 200, 4], Budget(rows=3, tokens=1_000, packs=True), "rows"),
        ([9, 30, 200, 40], Budget(rows=8, tokens=256, packs=True), "tokens"),
        ([9, 30, 200, 4], Budget(rows=8, tokens=256, packs=True), "arrival"),
        ([9, 30, 257, 4], Budget(rows=8, tokens=300, packs=True), "arrival"),
        ([3_000, 2_900], Budget(rows=8, tokens=2_048, packs=True), "tokens"),
        ([3_000], Budget(rows=8, tokens=2_048, packs=True), "arrival"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_batch_says_what_ended_it(lengths: list[int], budget: Budget, cut: str) -> None:
    pool = pool_of([row(tokens, (1, at)) for at, tokens in enumerate(lengths)])

    pool.take(budget)

    assert pool.cut == cut


def test_less_urgent_rows_that_wait_cut_nothing() -> None:
    pool = pool_of([row(5, (0, 0)), row(5, (1, 0))])

    pool.take(Budget(rows=8, tokens=256))

    assert (pool.cut, len(pool)) == ("arrival", 1)


@given(rows, budgets)
def test_a_batch_that_no_limit_ended_left_nothing_of_its_rank(waiting: Rows, budget: Budget) -> None:
    pool = pool_of(waiting)

    while batch := pool.take(budget):
        left = pool.waiting(batch[0].urgency[0])
        assert (pool.cut == "arrival") == (left == 0)
        assert pool.cut != "rows" or len(batch) == budget.rows


def test_a_dear_forward_is_cut_coarser_than_a_cheap_one() -> None:
    waiting = [row(tokens) for tokens in range(4, 260, 4)]

    cheap = drained(pool_of(waiting), Budget(rows=64, tokens=10**6, overhead=0.0))
    dear = drained(pool_of(waiting), Budget(rows=64, tokens=10**6, overhead=10**6))

    assert len(dear) < len(cheap)


def long_tailed(count: int, chance: random.Random) -> Rows:
    """Lengths as texts have them: log-normal, about 60 tokens in the mean, a tail up to 512; arrivals in order."""
    return [
        row(min(512, max(4, round(chance.lognormvariate(3.6, 0.95)))), urgency=(1, arrival)) for arrival in range(count)
    ]


def test_where_the_model_packs_the_oldest_run_together_whatever_their_lengths() -> None:
    chance = random.Random(8)
    pool = pool_of([row(chance.choice((5, 30, 90, 250)), (1, at)) for at in range(60)])

    batch = pool.take(Budget(rows=16, tokens=4_096, packs=True))

    assert [each.urgency for each in batch] == [(1, at) for at in range(16)]


@given(rows, budgets)
def test_where_the_model_packs_no_row_is_overtaken_by_a_less_urgent_one(waiting: Rows, budget: Budget) -> None:
    batch = pool_of(waiting).take(replace(budget, packs=True))

    assert [each.urgency for each in batch] == sorted(each.urgency for each in waiting)[: len(batch)]


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_a_long_tailed_mix_pads_little_in_batches_worth_a_forward(packs: bool) -> None:
    chance = random.Random(20)
    budget = Budget(rows=64, tokens=2_048, packs=packs)
    pool: Pool[None] = Pool()
    batches: list[Rows] = []
    arrivals = long_tailed(4_096, chance)
    assert 50 < statistics.mean(each.tokens for each in arrivals) < 70

    for each in arrivals:
        pool.add([each])
        if len(pool) == 256:
            batches.append(pool.take(budget))

    real = sum(each.tokens for batch in batches for each in batch)
    assert sum(budget.computed(batch) for batch in batches) / real <= 1.15
    assert statistics.mean(len(batch) for batch in batches) >= 16


@given(rows, budgets)
def test_a_batch_is_of_one_rank_so_that_bulk_costs_a_single_text_nothing(waiting: Rows, budget: Budget) -> None:
    batches = drained(pool_of(waiting), budget)

    assert all(len({each.urgency[0] for each in batch}) == 1 for batch in batches)
