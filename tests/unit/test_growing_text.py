"""A text is put together from deltas in order, nothing twice and nothing missing, whatever is delivered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.errors import Malformed, StreamDiverged
from millstream.broker.contract.generation import Generation
from millstream.broker.contract.partial import Delta
from millstream.client.growing_text import CHUNK, MOST_PIECES, GrowingText

TEXT = "the mïll 🌊 turns 水车"


def pieces(growing: GrowingText) -> list[str]:
    found = []
    while piece := growing.take():
        found.append(piece)
    return found


spans = st.tuples(st.integers(0, len(TEXT)), st.integers(0, 6))
"""A delta of TEXT: its offset and its length."""


@given(st.lists(st.one_of(spans, st.sampled_from(["take", "fill", "fill nothing"]))), st.integers(0, len(TEXT)))
def test_whatever_is_delivered_the_pieces_are_the_text_from_its_start(events: list[object], least: int) -> None:
    growing, got, partial = GrowingText(), "", least
    for event in events:
        if isinstance(event, tuple):
            offset, length = event
            growing.add(Delta(offset, TEXT[offset : offset + length]))
            partial = max(partial, min(offset + length, len(TEXT)))
        elif event == "take":
            got += growing.take()
        else:
            growing.fill(TEXT[:partial] if event == "fill" else "")
            assert not growing.has_gap
        assert growing.text == got == TEXT[: len(got)]

    got += "".join(pieces(growing))
    assert got == TEXT[: len(got)]
    growing.finish(TEXT)
    assert got + "".join(pieces(growing)) == TEXT


@given(st.lists(spans))
def test_a_gap_that_was_filled_once_loses_no_delta_behind_it(deltas: list[tuple[int, int]]) -> None:
    growing = GrowingText()
    end = max((min(offset + length, len(TEXT)) for offset, length in deltas), default=0)
    for offset, length in deltas:
        growing.add(Delta(offset, TEXT[offset : offset + length]))

    growing.fill(TEXT[:end])

    assert "".join(pieces(growing)) == TEXT[:end]


def test_pieces_come_as_they_were_emitted_and_repeated_text_is_cut() -> None:
    growing = GrowingText()

    news = [growing.add(delta) for delta in (Delta(0, "ab"), Delta(0, "ab"), Delta(1, "bcd"), Delta(4, ""))]

    assert news == [True, False, True, False]
    assert pieces(growing) == ["ab", "cd"]


def test_a_delta_behind_a_gap_waits_for_the_text_between() -> None:
    growing = GrowingText()
    growing.add(Delta(0, "a"))

    assert growing.add(Delta(3, "d"))
    assert growing.has_gap
    assert pieces(growing) == ["a"]
    growing.fill("abc")

    assert not growing.has_gap
    assert pieces(growing) == ["bc", "d"]


def test_a_gap_is_closed_by_a_delta_that_repeats_the_text_between() -> None:
    growing = GrowingText()
    growing.add(Delta(2, "c"))

    assert growing.add(Delta(0, "ab"))

    assert not growing.has_gap
    assert pieces(growing) == ["ab", "c"]


def test_if_the_server_does_not_have_the_text_between_the_end_gives_it() -> None:
    growing = GrowingText()
    growing.add(Delta(2, "c"))
    growing.fill("")

    assert not growing.add(Delta(3, "d"))
    assert not growing.has_news
    growing.finish("abcd")

    assert pieces(growing) == ["abcd"]


def test_the_end_takes_the_place_of_what_was_not_taken() -> None:
    growing = GrowingText()
    growing.add(Delta(0, "ab"))
    growing.take()
    growing.add(Delta(2, "x"))

    growing.finish("abc")

    assert pieces(growing) == ["c"]


@pytest.mark.parametrize("other", ["", "a", "ax", "axc"])
def test_a_whole_text_that_does_not_begin_with_what_was_handed_out_diverged(other: str) -> None:
    growing = GrowingText()
    growing.add(Delta(0, "ab"))
    growing.take()

    with pytest.raises(StreamDiverged):
        growing.finish(other)

    assert growing.text == "ab"


def test_a_text_so_far_that_contradicts_what_was_handed_out_diverged_and_a_short_one_did_not() -> None:
    growing = GrowingText()
    growing.add(Delta(0, "ab"))
    growing.take()
    growing.add(Delta(3, "d"))

    growing.fill("a")
    growing.add(Delta(3, "d"))
    with pytest.raises(StreamDiverged):
        growing.fill("axc")


def test_a_generation_comes_back_and_may_have_fields_of_newer_workers() -> None:
    generation = Generation("a", "stop")

    assert Generation.read(generation.json()) == Generation.read({**generation.json(), "mood": 1}) == generation


@pytest.mark.parametrize(
    "value",
    [
        None,
        "a text",
        ["a", "stop"],
        {},
        {"text": "a"},
        {"text": 1, "finish_reason": "stop"},
        {"text": "a", "finish_reason": None},
        {"text": "a", "finish_reason": ""},
        {"text": "a", "finish_reason": "x" * 65},
    ],
)
def test_a_value_of_another_shape_is_no_generation(value: None) -> None:
    with pytest.raises(Malformed):
        Generation.read(value)


def test_a_gap_is_filled_by_a_part_of_the_text_that_fits_what_was_handed_out() -> None:
    growing = GrowingText()
    growing.add(Delta(0, "abc"))
    first = growing.take()
    growing.add(Delta(6, "gh"))
    growing.fill("cdef", 2)
    rest = pieces(growing)

    assert (first, rest, growing.has_gap) == ("abc", ["def", "gh"], False)
    growing.add(Delta(9, "j"))
    with pytest.raises(StreamDiverged):
        growing.fill("xhi", 6)


def test_pieces_of_a_long_text_are_joined_whether_they_wait_or_were_taken() -> None:
    growing, words = GrowingText(), [f"{number} " for number in range(20_000)]
    text, offset = "".join(words), 0
    for word in words:
        growing.add(Delta(offset, word))
        offset += len(word)

    got = pieces(growing)

    assert got[: MOST_PIECES - 1] == words[: MOST_PIECES - 1]
    assert len(got) < MOST_PIECES + len(text) / CHUNK + 2
    assert growing.text == "".join(got) == text
    growing.finish(text + "end")
    assert growing.take() == "end"
