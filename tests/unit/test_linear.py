"""Linear layers give what they gave, whatever computes them; where that is not so they stay as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.activations import NewGELUActivation

from millstream.worker.models.kernels.linear import ARCHITECTURES, Prepacked, prepack

SIZES: Mapping[str, int] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
OTHER_NAMES: Mapping[str, Mapping[str, int]] = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1},
}
SPECIAL: Mapping[str, int] = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 1) | dict.fromkeys(
    ("eos_token_id", "sep_token_id"), 2
)


def random_model(architecture: str, kind: Any = AutoModel, **settings: object) -> Any:
    config = AutoConfig.for_model(architecture, **{**SIZES, **OTHER_NAMES.get(architecture, {}), **SPECIAL, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return kind.from_config(config).eval()


def output(model: Any, texts: int = 3, tokens: int = 9) -> torch.Tensor:
    ids = torch.arange(texts * tokens).view(texts, tokens) % 90 + 5
    mask = torch.ones_like(ids)
    # One is shorter than the others.
    ids[-1, -2:], mask[-1, -2:] = 1, 0
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=ids, attention_mask=mask)[0]
    return result


def kinds_of(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()} & {nn.Linear, Prepacked}


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_known_architecture_gives_the_same(architecture: str, kind: Any) -> None:
    model = random_model(architecture, kind)
    before = output(model)

    assert prepack(model) >= 8
    assert kinds_of(model) == {Prepacked}
    assert ((output(model) - before).norm() / before.norm()) < 1e-5


def activations_of(model: nn.Module) -> set[type]:
    return {type(layer.intermediate_act_fn) for layer in model.modules() if hasattr(layer, "intermediate_act_fn")}


@pytest.mark.parametrize(("activation", "left"), [("gelu", nn.Identity), ("gelu_new", NewGELUActivation)])
def test_a_gelu_is_computed_with_its_layer_and_another_activation_is_not(activation: str, left: type) -> None:
    model = random_model("bert", hidden_act=activation)
    before = output(model)

    assert prepack(model) == 13
    assert activations_of(model) == {left}
    assert ((output(model) - before).norm() / before.norm()) < 1e-5


def test_a_weight_that_others_use_too_stays() -> None:
    model = random_model("qwen3", AutoModelForCausalLM, tie_word_embeddings=True)
    before = output(model)

    assert prepack(model) == 14
    assert type(model.lm_head) is nn.Linear
    assert ((output(model) - before).norm() / before.norm()) < 1e-5


class Adapter(nn.Module):
    """As adapters do: it looks at the weights of the layers that it holds."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base = layer

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(rows.to(self.base.weight.dtype))
        return result


def test_what_others_put_into_a_model_keeps_its_layers() -> None:
    model = random_model("bert")
    inner = model.encoder.layer[0].output
    inner.dense = Adapter(inner.dense)
    before = output(model)

    assert prepack(model) == 12
    assert type(inner.dense.base) is nn.Linear
    assert ((output(model) - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize(
    ("module", "most"), [("worker.models.kernels.linear", 64), ("worker.generation.matrices", 128)]
)
def test_programs_of_onednn_that_are_kept_are_few(module: str, most: int) -> None:
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    code = f"import os, millstream.{module}; print(*(os.environ[name] for name in {names}))"
    # A new process: the first module of the two that a process imports decides.
    environment = {name: value for name, value in os.environ.items() if name not in names}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout.split() == [str(most)] * 2


def test_other_architectures_and_numbers_stay() -> None:
    assert prepack(random_model("deberta-v2")) == 0
    assert prepack(random_model("bert").bfloat16()) == 0
    assert prepack(nn.Sequential(nn.Linear(3, 3))) == 0


@pytest.mark.parametrize(
    "broken", [lambda rows, weights, bias, *how: rows.new_ones(len(rows), bias.numel()), lambda *words: 1 / 0]
)
def test_where_the_operator_is_another_one_layers_stay(
    broken: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", broken)

    model = random_model("bert", AutoModelForSequenceClassification)

    assert prepack(model) == 0
    assert kinds_of(model) == {nn.Linear}
    assert "14 of 14 linear layers are not replaced" in caplog.text


def test_without_onednn_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)

    assert prepack(random_model("bert")) == 0
