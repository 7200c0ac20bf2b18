"""Linear layers of oneDNN for float32 models on the CPU. Their weights are reordered once, to oneDNN's fastest layout.

torch itself multiplies float32 with MKL, with weights in the layout of the file; benchmarks/linear_layers.py compares
the two. The operators are the ones that torch.compile emits for a frozen model (torch._inductor.mkldnn_lowerings).
They are no public interface, so each new layer is compared with the old one before it replaces it.
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
"""Model types that only call their linear layers. Others also read the weights, which a replaced layer lacks."""

_ROWS, _CLOSE = 5, 1e-5
"""Rows of the comparison, and its largest relative difference."""

_ACTIVATION = "intermediate_act_fn"

# oneDNN compiles a program of about 0.5 MB for each number of rows and each shape. Its default is to keep 1,024.
for _capacity in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "64")


class Prepacked(nn.Module):
    """A linear layer [.., in] -> [.., out] that holds its weights in oneDNN's own layout only.

    With `gelu` it also applies GELU, while the product is still in the cache of the core.
    """

    def __init__(self, layer: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.bias = layer.bias
        self._weights = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        # Name of the activation, its scalars, its variant: GELU has "none", the exact one, and "tanh".
        self._post_op: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weights, self.bias, *self._post_op)
        return product


def prepack(model: nn.Module) -> int:
    """Replaces linear layers of `model`, if float32 on the CPU and known to work; returns their number."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    # A layer whose weight is shared, for example with an embedding, is not replaced.
    uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    # Names, not layers: a reference to a layer keeps its weights, so the model would need its memory twice.
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
    except Exception as error:  # noqa: BLE001 - after any failure the remaining layers run as before
        log.warning("oneDNN cannot take this model's linear layers: %s", described(error))
    if replaced < len(places):
        log.warning("%d of %d linear layers are not replaced", len(places) - replaced, len(places))
    return replaced


def _replace(holder: nn.Module, name: str) -> bool:
    """Replaces one layer, and the GELU after it if there is one. Returns False if the results differ."""
    layer = cast(nn.Linear, getattr(holder, name))
    activation: Any = getattr(holder, _ACTIVATION, None)
    # Such a module applies its activation to the layer's output and does nothing else.
    gelu = type(holder).__name__.endswith("Intermediate") and name == "dense" and type(activation) is GELUActivation
    made = Prepacked(layer, gelu=gelu)
    if not _are_equal(made, nn.Sequential(layer, activation) if gelu else layer, layer.in_features):
        return False
    setattr(holder, name, made)
    if gelu:
        setattr(holder, _ACTIVATION, nn.Identity())
    return True


def _holders(model: nn.Module) -> list[nn.Module]:
    """Returns modules of known architectures that transformers defines. Others, such as adapters, may read weights."""
    known = [
        each
        for each in model.modules()
        if isinstance(each, PreTrainedModel) and getattr(each.config, "model_type", None) in ARCHITECTURES
    ]
    holders = {id(holder): holder for each in known for holder in each.modules()}
    return [each for each in holders.values() if type(each).__module__.startswith("transformers.models.")]


def _suits(weight: torch.Tensor) -> bool:
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() > 0
    # weights.py fills a layer with NaN if its weights are missing and nothing reads it.
    return plain and not bool(weight.isnan().any())


def _are_equal(made: Prepacked, layer: nn.Module, width: int) -> bool:
    rows = torch.linspace(-1, 1, _ROWS * width).view(_ROWS, -1)
    with torch.inference_mode():
        expected: Any = layer(rows)
        return bool((made(rows) - expected).norm() <= _CLOSE * expected.norm())
