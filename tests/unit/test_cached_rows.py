"""What was found in the cache is in its place from the start; equal rows travel once, and share what comes."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, MixedModels
from millstream.broker.contract.job import Reply
from millstream.broker.queue.cache import Cached
from millstream.client.result import Embeddings
from millstream.client.row_results import RowResults
from millstream.client.split import Part, split_once


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.sets(st.integers(0, 39)), st.integers(1, 8))
def test_each_row_gets_its_outcome_and_each_text_travels_once(texts: list[str], found: set[int], most: int) -> None:
    hit_texts = {texts[row] for row in found if row < len(texts)}
    hits = {row: Cached(text.upper()) for row, text in enumerate(texts) if text in hit_texts}
    parts = split_once({row: 1 for row in range(len(texts)) if row not in hits}, texts, most, 1_000)
    rows = RowResults(len(texts), hits)

    travelling = [texts[row] for part in parts for row in part.rows]
    for part in parts:
        rows.place(part, Reply(values=[texts[row].upper() for row in part.rows]))

    assert sorted(travelling) == sorted(set(texts) - hit_texts)
    assert rows.missing == 0
    assert rows.outcomes() == [text.upper() for text in texts]


def test_twins_share_an_error_and_a_cut() -> None:
    error = InvalidRequest("no")
    rows = RowResults(6, {5: Cached(np.array([3], np.float32), truncated=True)})
    part = Part((0, 1), 2, {0: [2], 1: [3, 4]})

    rows.place(part, Reply(vectors=np.array([[1]], np.float32), errors={0: error}, truncated=(1,), tokens=7))

    assert rows.missing == 0
    assert [
        each if isinstance(each, MillstreamError) else cast(np.ndarray, each).tolist() for each in rows.outcomes()
    ] == [
        error,
        [1],
        error,
        [1],
        [1],
        [3],
    ]


def test_kept_answers_and_new_ones_of_another_model_are_not_mixed() -> None:
    kept = Cached(np.array([3], np.float32), fingerprint="w1")
    same, other = RowResults(2, {1: kept}), RowResults(2, {1: kept})

    same.place(Part((0,), 2), Reply(vectors=np.array([[1]], np.float32), fingerprint="w1"))
    other.place(Part((0,), 2), Reply(vectors=np.array([[1]], np.float32), fingerprint="w2"))

    value = same.value(1.0)
    assert isinstance(value, Embeddings)
    assert value.fingerprint == "w1"
    with pytest.raises(MixedModels):
        other.value(1.0)


def test_a_call_tells_of_each_text_that_was_cut_and_of_the_tokens_that_ran() -> None:
    rows = RowResults(4, {2: Cached(np.array([3], np.float32), truncated=True), 3: Cached(np.array([4], np.float32))})

    rows.place(Part((0,), 2, {0: [1]}), Reply(vectors=np.array([[1]], np.float32), truncated=(0,), tokens=7))

    value = rows.value(1.0)
    assert isinstance(value, Embeddings)
    assert value.tolist() == [[1], [1], [3], [4]]
    assert (value.truncated, value.usage) == ((0, 1, 2), {"tokens": 7})


def test_a_call_that_was_found_whole_cost_no_tokens() -> None:
    value = RowResults(2, {0: Cached(np.array([1], np.float32)), 1: Cached(np.array([2], np.float32))}).value(1.0)

    assert isinstance(value, Embeddings)
    assert value.usage == {"tokens": 0}
