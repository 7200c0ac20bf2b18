"""Tables in a terminal of any width: whole columns go first, and no line is longer than the terminal is wide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.cli.table import cut, describe, fit

ROWS = [("NAME", "WAITING", "PADDING"), ("embed", "12", "1.05"), ("a-long-name", "0", "-")]


def test_without_a_width_nothing_is_left_out() -> None:
    assert fit(ROWS, None, ["PADDING"]).splitlines() == [
        "NAME         WAITING  PADDING",
        "embed        12       1.05",
        "a-long-name  0        -",
    ]


def test_columns_are_left_out_in_the_order_given_until_the_rows_fit() -> None:
    assert fit(ROWS, 29, ["PADDING", "WAITING"]).splitlines()[0] == "NAME         WAITING  PADDING"
    assert fit(ROWS, 28, ["PADDING", "WAITING"]).splitlines()[0] == "NAME         WAITING"
    assert fit(ROWS, 19, ["PADDING", "WAITING"]).splitlines()[0] == "NAME"
    assert fit(ROWS, 28, ["absent", "WAITING"]).splitlines()[0] == "NAME         PADDING"


def test_what_is_still_too_long_is_cut() -> None:
    assert fit(ROWS, 8, ["PADDING", "WAITING"]).splitlines() == ["NAME", "embed", "a-lon..."]


@pytest.mark.parametrize(("width", "expected"), [(None, "abcdef"), (6, "abcdef"), (5, "ab..."), (2, ".."), (0, "")])
def test_a_cut_ends_with_dots(width: int | None, expected: str) -> None:
    assert cut("abcdef", width) == expected


def test_a_long_fact_goes_on_below_with_its_words_whole() -> None:
    facts = [("state", "failed: the worker died " + "x" * 30), ("age", "3s")]

    assert describe(facts, None).splitlines() == [f"state  failed: the worker died {'x' * 30}", "age    3s"]
    assert describe(facts, 38).splitlines() == ["state  failed: the worker died", f"       {'x' * 30}", "age    3s"]
    assert describe([], 10) == ""


@given(
    st.integers(0, 60),
    st.lists(st.tuples(st.text("ab", max_size=30), st.text("cd", max_size=30)), max_size=4),
)
def test_no_line_is_wider_than_the_terminal(width: int, cells: list[tuple[str, str]]) -> None:
    shown = fit([("ONE", "TWO"), *cells], width, ["TWO"]).split("\n")

    assert len(shown) == len(cells) + 1
    assert all(len(line) <= width for line in shown)
