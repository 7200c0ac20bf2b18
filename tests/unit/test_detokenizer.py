"""Detokenising: the pieces of a text joined are what all its tokens give at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import byte_level, ids_of, metaspace, text_settings
from transformers import PreTrainedTokenizerFast

from millstream.worker.generation.detokenizer import Detokenizer

TOKENIZERS = [byte_level(), metaspace()]

CHARACTERS = [
    "a",
    " ",
    "the",
    " mill",
    "水",
    "车",
    "😀",
    "é",
    "e\u0301",
    "👨‍👩‍👧",
    "\n",
    "  ",
    "\ufffd",
    "ह",
    "ि",
    "<|im_end|>",
]


def detokenizer(tokenizer: PreTrainedTokenizerFast, prompt: list[int] | None = None) -> Detokenizer:
    return Detokenizer(tokenizer.backend_tokenizer, text_settings(tokenizer).special, prompt or [])


def pieces(of: Detokenizer, ids: list[int]) -> list[str]:
    return [*map(of.step, ids), of.tail()]


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(CHARACTERS), max_size=40), at=st.integers(0, 200))
@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte level", "metaspace"])
def test_the_pieces_of_a_text_joined_are_the_whole(
    tokenizer: PreTrainedTokenizerFast, parts: list[str], at: int
) -> None:
    ids = ids_of("".join(parts), tokenizer)
    if tokenizer is byte_level():  # the other one revises all bytes of a character that is cut off
        ids = ids[:at]

    joined = "".join(pieces(detokenizer(tokenizer), ids))

    assert joined == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, byte_level().backend_tokenizer.get_vocab_size() + 5), max_size=100))
def test_bytes_in_any_order_give_the_whole_text(ids: list[int]) -> None:
    joined = "".join(pieces(detokenizer(byte_level()), ids))

    assert joined == byte_level().backend_tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 300), max_size=100), cut=st.integers(0, 100))
@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte level", "metaspace"])
def test_pieces_depend_on_the_tokens_alone(tokenizer: PreTrainedTokenizerFast, ids: list[int], cut: int) -> None:
    whole, first, second = detokenizer(tokenizer), detokenizer(tokenizer), detokenizer(tokenizer)
    before = [first.step(token) for token in ids[:cut]]
    replayed = [second.step(token) for token in ids[:cut]]

    assert before == replayed
    assert replayed + pieces(second, ids[cut:]) == pieces(whole, ids)


def test_an_unfinished_character_is_shown_when_it_is_whole_or_at_the_end() -> None:
    ids = ids_of("😀")
    of = detokenizer(byte_level())

    assert [of.step(token) for token in ids[:-1]] == ["", "", ""]
    assert of.tail() == "\ufffd"
    assert of.step(ids[-1]) == "😀"
    assert of.tail() == ""


def test_special_tokens_have_no_text() -> None:
    assert "".join(pieces(detokenizer(byte_level()), ids_of("a<|im_end|>b<|end|>"))) == "ab"


def test_a_text_behind_its_prompt_keeps_the_space_between_them() -> None:
    prompt, ids = ids_of("the mill", metaspace()), ids_of("turns", metaspace())

    assert "".join(pieces(detokenizer(metaspace(), prompt), ids)) == " turns"
    assert "".join(pieces(detokenizer(metaspace()), ids)) == "turns"


def test_a_prompt_that_ends_inside_a_character_leaves_the_text_its_own() -> None:
    ids = ids_of("😀 a")

    assert "".join(pieces(detokenizer(byte_level(), ids[:2]), ids[2:])).endswith(" a")


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte level", "metaspace"])
def test_endless_invalid_bytes_are_shown_as_they_come(tokenizer: PreTrainedTokenizerFast) -> None:
    of = detokenizer(tokenizer)
    token = ids_of("😀", tokenizer)[-1]

    shown = "".join(of.step(token) for _ in range(1_000))

    assert 980 <= len(shown) <= 1_000
    assert shown + of.tail() == "\ufffd" * 1_000
