"""Every row has its place in one sequence, and packing never computes more than padding would."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millstream.worker.layout import PACKED_COST, SEQUENCE_TOKENS, computed, layout

lengths = st.lists(st.integers(1, 2 * SEQUENCE_TOKENS) | st.integers(1, SEQUENCE_TOKENS), max_size=80)
short = st.lists(st.integers(1, SEQUENCE_TOKENS), min_size=1, max_size=80)


@given(lengths, st.booleans())
def test_each_row_is_in_one_sequence_and_fits_there(rows: list[int], packs: bool) -> None:
    found = layout(rows, packs)

    assert sorted(row for sequence in found.sequences for row in sequence) == list(range(len(rows)))
    assert all(sum(rows[row] for row in sequence) <= found.width for sequence in found.sequences)
    assert all(found.sequences)
    assert sum(rows) <= found.tokens <= max(rows, default=0) * len(rows)


@given(lengths)
def test_a_model_that_pads_has_a_row_a_sequence(rows: list[int]) -> None:
    assert [list(sequence) for sequence in layout(rows, packs=False).sequences] == [[at] for at in range(len(rows))]
    assert computed(rows, packs=False) == max(rows, default=0) * len(rows)


@given(short, st.integers(SEQUENCE_TOKENS + 1, 2_000))
def test_what_is_longer_than_a_sequence_is_padded_with_its_company(rows: list[int], longer: int) -> None:
    assert len(layout([*rows, longer], packs=True).sequences) == len(rows) + 1


@given(short)
def test_packed_sequences_stay_short_and_are_worth_it(rows: list[int]) -> None:
    found = layout(rows, packs=True)

    if found.is_packed:
        assert found.width < 2 * SEQUENCE_TOKENS
        assert found.tokens * PACKED_COST < computed(rows, packs=False)


def test_rows_of_one_length_are_padded_and_rows_of_many_are_packed() -> None:
    assert layout([40] * 32, packs=True).width == 40

    mixed = layout([250, 10, 20, 200, 30, 40, 60, 100], packs=True)

    assert (len(mixed.sequences), mixed.width, mixed.is_packed) == (3, 250, True)
    assert (mixed.tokens, mixed.cost) == (750, 750 * PACKED_COST)
