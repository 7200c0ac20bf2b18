"""The echo model misbehaves in as many ways as its name says."""

from __future__ import annotations

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
