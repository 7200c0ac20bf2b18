"""Models that compute differently from some length on do not keep to it: what they ran before does not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from transformers import AutoModel

from millstream.worker.models.loading.lengths import UNLIMITED, forget


def net(folder: Path, name: str, **settings: Any) -> Any:
    return AutoModel.from_pretrained(architectures.save_net(folder, name, "embed", "right", **settings)).eval()


def tokens(model: Any, count: int) -> torch.Tensor:
    """Of the last of `count` tokens, what the model makes."""
    ids = torch.arange(5, 5 + count)[None] % 40
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids).last_hidden_state[0, -1]
    return found.clone()


@pytest.mark.parametrize(
    ("name", "settings", "upto"),
    [
        ("rope, dynamic", {"max_position_embeddings": 16}, 16),
        ("rope, long", {}, 16),
        ("big_bird", {}, 28),
    ],
)
def test_a_forward_does_not_depend_on_those_before_it(
    name: str, settings: dict[str, Any], upto: int, tmp_path: Path
) -> None:
    lengths = (upto, upto + 1, 40, upto + 5, 3, upto, 50, upto + 1, upto)
    expected = [tokens(net(tmp_path / "net", name, **settings), length) for length in lengths]
    model = net(tmp_path / "net", name, **settings)

    assert forget(model) == upto
    got = [tokens(model, length) for length in lengths]

    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(got, expected, strict=True))


def test_most_models_know_no_such_length(tmp_path: Path) -> None:
    assert [forget(net(tmp_path / name, name)) for name in ("bert", "gpt2", "llama")] == [UNLIMITED] * 3
