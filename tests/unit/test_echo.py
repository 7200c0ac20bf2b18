"""The echo model misbehaves in as many ways as its name says."""

from __future__ import annotations

import numpy as np
import pytest

from millstream.worker.models.base import Prepared
from millstream.worker.models.echo import EchoModel


def forward(model: EchoModel, text: str) -> object:
    return model.forward([Prepared(1, text)])


def test_a_name_of_several_parts_gives_several_habits(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    model = EchoModel("sleep:0.02,raise:poison")

    assert forward(model, "corn") == ["corn"]
    with pytest.raises(RuntimeError):
        forward(model, "poisoned corn")
    assert slept == [0.02, 0.02]


def test_words_that_are_no_habits_change_nothing() -> None:
    assert forward(EchoModel("some/model:v1,raise:"), "some/model raise") == ["some/model raise"]


def test_a_forward_can_take_longer_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)

    EchoModel("sleep:0.5+0.125").forward([Prepared(1, "corn")] * 3)

    assert slept == [0.875]


def test_it_can_answer_vectors_of_a_given_length() -> None:
    vectors = EchoModel("vector:3").forward([Prepared(1, "corn")] * 2)

    assert isinstance(vectors, np.ndarray)
    assert vectors.shape == (2, 3)
    assert vectors.dtype == np.float32
