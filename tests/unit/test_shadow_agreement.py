"""Answers of two versions are compared by what their operation gives."""

from __future__ import annotations

import numpy as np
import pytest

from millstream.client.generate import Generated
from millstream.client.result import Embeddings, Values
from millstream.client.shadow_agreement import agreement


def vectors(*rows: list[float], dtype: str = "float32") -> Embeddings:
    return Embeddings.of(np.array(rows, dtype=dtype), 0, (), {})


def values(*rows: object) -> Values:
    return Values.of(list(rows), 0, (), {})  # type: ignore[arg-type]


def test_vectors_have_the_mean_of_their_cosines() -> None:
    one = vectors([1, 0], [0, 2])

    assert agreement("vectors", one, vectors([3, 0], [0, 1])) == pytest.approx(1)
    assert agreement("vectors", one, vectors([0, 1], [0, 1])) == pytest.approx(0.5)
    assert agreement("vectors", one, vectors([0, 0], [0, 0])) == 0
    assert agreement("vectors", one, vectors([1, 0, 0], [0, 1, 0])) == 0
    assert agreement("vectors", one, values([1, 0])) == 0
    assert agreement("vectors", vectors([1, 0], dtype="float16"), vectors([1, 1], dtype="float16")) == pytest.approx(
        0.7071, abs=1e-3
    )


def test_binary_vectors_have_the_share_of_equal_bits() -> None:
    assert agreement("vectors", vectors([0b11110000], dtype="uint8"), vectors([0b11110011], dtype="uint8")) == 0.75


def test_scores_have_their_rank_correlation() -> None:
    one = values(0.9, 0.5, 0.1)

    assert agreement("scores", one, values(30, 20, 10)) == pytest.approx(1)
    assert agreement("scores", one, values(10, 20, 30)) == pytest.approx(-1)
    assert agreement("scores", one, values(30, 10, 20)) == pytest.approx(0.5)
    # Equal scores have the mean of their ranks.
    assert agreement("scores", values(1, 1, 2), values(1, 1, 3)) == pytest.approx(1)
    assert agreement("scores", values(0.3), values(0.9)) == 1
    assert agreement("scores", one, values(1, 2)) == 0
    assert agreement("scores", one, values(1, 1, 1)) == 0


def test_other_answers_have_the_share_of_equal_rows() -> None:
    texts = [Generated(text, "stop", fingerprint="one") for text in ("a", "b")]
    others = [Generated(text, "length", fingerprint="two") for text in ("a", "c")]

    assert agreement("generations", values(*texts), values(*others)) == 0.5
    assert agreement("any", values({"label": 1}, [1, 2]), values({"label": 1}, [1, 2])) == 1
    assert agreement("any", values("a"), values("a", "b")) == 0
    assert agreement("any", values(), values()) == 1
