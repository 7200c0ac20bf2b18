"""A list becomes jobs that hold each row once, within limits, the long ones first."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from millstream.client.split import MAX_PART_BYTES, Part, estimate_tokens, split

sizes = st.dictionaries(st.integers(0, 500), st.integers(0, 700_000) | st.integers(0, 2_000), max_size=80)
limits = st.tuples(st.integers(1, 64), st.integers(1, 10_000))


@given(sizes, limits)
def test_every_row_is_in_one_part_once_and_in_order_there(given_sizes: dict[int, int], limit: tuple[int, int]) -> None:
    parts = split(given_sizes, *limit)

    assert sorted(row for part in parts for row in part.rows) == sorted(given_sizes)
    assert all(part.rows and list(part.rows) == sorted(part.rows) for part in parts)


@given(sizes, limits)
def test_parts_keep_to_rows_padded_tokens_and_bytes_but_for_one_row_alone(
    given_sizes: dict[int, int], limit: tuple[int, int]
) -> None:
    most_rows, most_tokens = limit

    for part in split(given_sizes, most_rows, most_tokens):
        longest = max(given_sizes[row] for row in part.rows)
        assert len(part.rows) <= most_rows
        assert len(part.rows) == 1 or len(part.rows) * estimate_tokens(longest) <= most_tokens
        assert len(part.rows) == 1 or sum(given_sizes[row] for row in part.rows) <= MAX_PART_BYTES


@given(sizes, limits)
def test_long_rows_come_first(given_sizes: dict[int, int], limit: tuple[int, int]) -> None:
    parts = split(given_sizes, *limit)

    for earlier, later in itertools.pairwise(parts):
        assert min(given_sizes[row] for row in earlier.rows) >= max(given_sizes[row] for row in later.rows)


@given(sizes, limits)
def test_a_part_tells_its_tokens(given_sizes: dict[int, int], limit: tuple[int, int]) -> None:
    for part in split(given_sizes, *limit):
        assert part.tokens == sum(estimate_tokens(given_sizes[row]) for row in part.rows)


def test_rows_of_like_length_share_a_job() -> None:
    parts = split({0: 40, 1: 4_000, 2: 40, 3: 4_000}, most_rows=2, most_tokens=10_000)

    assert [part.rows for part in parts] == [(1, 3), (0, 2)]


def test_nothing_makes_no_jobs_and_an_empty_text_makes_one() -> None:
    assert split({}, 8, 100) == []
    assert split({3: 0}, 8, 100) == [Part((3,), 2)]
