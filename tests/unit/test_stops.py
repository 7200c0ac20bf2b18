"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millstream.worker.generation.stops import Stops

LETTERS = st.text("ab", max_size=12)


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """What is shown of each piece and at the end, and whether a stop string ended the text."""
    each, shown = Stops(stops), []
    for piece in pieces:
        text, is_end = each.feed(piece)
        shown.append(text)
        if is_end:
            return shown, True
    return [*shown, each.end("")], False


def expected(stops: list[str], text: str) -> tuple[str, bool]:
    """The text up to the stop string that is complete first, the longest if several are."""
    for end in range(len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), pieces=st.lists(LETTERS, max_size=8))
def test_a_text_ends_at_the_first_complete_stop_string_however_it_is_cut(stops: list[str], pieces: list[str]) -> None:
    shown, is_end = run(stops, pieces)

    assert ("".join(shown), is_end) == expected(stops, "".join(pieces))
    assert not any(stop in "".join(shown) for stop in stops)


@given(stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), text=LETTERS)
def test_no_more_is_held_back_than_the_beginning_of_a_stop_string(stops: list[str], text: str) -> None:
    each = Stops(stops)

    shown, is_end = each.feed(text)

    if not is_end:
        assert shown + each.held == text
        beginnings = [stop[:length] for stop in stops for length in range(len(stop))]
        assert each.held == max((part for part in beginnings if text.endswith(part)), key=len)


def test_a_stop_string_over_several_pieces_is_never_shown() -> None:
    assert run(["END"], ["the E", "N", "D of it"]) == (["the ", "", ""], True)


def test_the_beginning_of_a_stop_string_belongs_to_a_text_that_ends_otherwise() -> None:
    stops = Stops(["END"])

    assert stops.feed("the EN").text == "the "
    assert stops.end("") == "EN"
    assert stops.end("D!") == ""
    assert stops.end("!") == "EN!"
    assert stops.held == "EN"


def test_a_text_without_stop_strings_is_shown_at_once() -> None:
    assert run([], ["a", "b"]) == (["a", "b", ""], False)
