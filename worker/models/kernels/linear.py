"""Linear layers of float32 models on the CPU by oneDNN, their weights laid out once as it reads them fastest.

torch multiplies float32 with MKL, from weights as they lie in the file (benchmarks/linear_layers.py compares the two).
The operators are those that torch.compile emits for a frozen model (torch._inductor.mkldnn_lowerings). They are no
public interface, so each layer is compared with what it was before it is replaced.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from millstream.broker.contract.errors import described

log = logging.getLogger(__name__)

ARCHITECTURES = frozenset(
    {
        "bert",
        "camembert",
        "distilbert",
        "electra",
        "modernbert",
        "mpnet",
        "qwen2",
        "qwen3",
        "roberta",
        "xlm-roberta",
    }
)
"""Those that only call their linear layers. Others look at the weights, too, which are not there any more."""

_ROWS, _CLOSE = 5, 1e-5

_ACTIVATION = "intermediate_act_fn"

# oneDNN makes a program for each number of rows and each shape, half a megabyte each. By itself it keeps 1,024.
for _capacity in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "64")


class Prepacked(nn.Module):
    """A linear layer [.., in] -> [.., out] that holds its weights in oneDNN's own layout only.

    With `gelu` it applies that, too, while what it computed is still in the core's cache.
    """

    def __init__(self, layer: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.bias = layer.bias
        self._weights = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        # An activation, its numbers, its kind: "tanh" is the other one of GELU.
        self._then: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weights, self.bias, *self._then)
        return product


def prepack(model: nn.Module) -> int:
    """Replace the linear layers of `model` where that is known to work, float32 on the CPU; returns how many."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    # What is the weight of an embedding, too, stays where it is.
    uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    # By their names: whoever holds a layer keeps its weights, and the model would need its memory twice.
    places = [
        (holder, name)
        for holder in _holders(model)
        for name, layer in holder.named_children()
        if type(layer) is nn.Linear and uses[id(layer.weight)] == 1 and _suits(layer.weight)
    ]
    replaced = 0
    try:
        for holder, name in places:
            replaced += _replace(holder, name)
    except Exception as error:  # noqa: BLE001 - whatever it is, the layers may run as they ever did
        log.warning("oneDNN cannot take this model's linear layers: %s", described(error))
    if replaced < len(places):
        log.warning("%d of %d linear layers stay as they are", len(places) - replaced, len(places))
    return replaced


def _replace(holder: nn.Module, name: str) -> bool:
    """Replace that layer, with the activation after it where it is one that oneDNN has; False where they differ."""
    layer = cast(nn.Linear, getattr(holder, name))
    activation: Any = getattr(holder, _ACTIVATION, None)
    # All that such a module does is one after the other.
    gelu = type(holder).__name__.endswith("Intermediate") and name == "dense" and type(activation) is GELUActivation
    made = Prepacked(layer, gelu=gelu)
    if not _are_equal(made, nn.Sequential(layer, activation) if gelu else layer, layer.in_features):
        return False
    setattr(holder, name, made)
    if gelu:
        setattr(holder, _ACTIVATION, nn.Identity())
    return True


def _holders(model: nn.Module) -> list[nn.Module]:
    """The modules of known architectures; those that others put among them, such as adapters, may read weights."""
    known = [
        each
        for each in model.modules()
        if isinstance(each, PreTrainedModel) and getattr(each.config, "model_type", None) in ARCHITECTURES
    ]
    holders = {id(holder): holder for each in known for holder in each.modules()}
    return [each for each in holders.values() if type(each).__module__.startswith("transformers.models.")]


def _suits(weight: torch.Tensor) -> bool:
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() > 0
    # NaN is what weights.py puts into a layer that nothing reads.
    return plain and not bool(weight.isnan().any())


def _are_equal(made: Prepacked, layer: nn.Module, width: int) -> bool:
    rows = torch.linspace(-1, 1, _ROWS * width).view(_ROWS, -1)
    with torch.inference_mode():
        expected: Any = layer(rows)
        return bool((made(rows) - expected).norm() <= _CLOSE * expected.norm())
