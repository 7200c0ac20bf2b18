"""The window of a map, without calls: what begins, what is waited for, and what is given out in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.errors import InvalidRequest, ModelFailed
from millstream.client.map_window import CALLS, MapWindow
from millstream.client.row_results import RowOutcome


class Complete:
    """A complete call with these outcomes."""

    def __init__(self, *outcomes: RowOutcome) -> None:
        self._outcomes = outcomes

    def outcomes(self) -> tuple[RowOutcome, ...]:
        return self._outcomes


def add(window: MapWindow[Complete], *outcomes: RowOutcome) -> Complete:
    call = Complete(*outcomes)
    window.add(call, len(outcomes))
    return call


@given(st.integers(1, 10_000), st.booleans())
def test_calls_begin_while_their_rows_fit_the_window(size: int, ordered: bool) -> None:
    window: MapWindow[Complete] = MapWindow(size, ordered, "values")
    rows = 0

    while window.has_room:
        add(window, *["row"] * window.rows_per_call)
        rows += window.rows_per_call

    assert size - CALLS < rows <= size


def test_an_ordered_map_waits_for_its_oldest_call_and_gives_out_its_rows() -> None:
    window: MapWindow[Complete] = MapWindow(8, True, "values")
    first, second = add(window, "a", "b"), add(window, "c")

    assert window.awaited == [first]
    assert list(window.give_out(0)) == ["a", "b"]
    assert window.awaited == [second]


def test_without_order_any_call_may_come_next_with_the_index_of_its_rows() -> None:
    window: MapWindow[Complete] = MapWindow(8, False, "values")
    first, second = add(window, "a", "b"), add(window, "c", "d")

    assert window.awaited == [first, second]
    assert list(window.give_out(1)) == [(2, "c"), (3, "d")]
    assert window.awaited == [first]


def test_an_error_is_raised_in_its_place_and_its_call_stays_to_be_cancelled() -> None:
    window: MapWindow[Complete] = MapWindow(8, True, "values")
    failing, other = add(window, "a", ModelFailed("no"), "b"), add(window, "c")
    results = window.give_out(0)

    assert next(results) == "a"
    with pytest.raises(ModelFailed):
        next(results)
    assert window.drop() == [failing, other]
    assert window.awaited == []


def test_errors_are_results_if_they_are_asked_for() -> None:
    window: MapWindow[Complete] = MapWindow(8, True, "outcomes")
    error = ModelFailed("no")
    add(window, "a", error)

    assert list(window.give_out(0)) == ["a", error]


@pytest.mark.parametrize(("size", "results"), [(0, "values"), (True, "values"), (1.5, "values"), (4, "errors")])
def test_a_wrong_window_is_refused(size: int, results: str) -> None:
    with pytest.raises(InvalidRequest):
        MapWindow(size, True, results)  # type: ignore[arg-type]
