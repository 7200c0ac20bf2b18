"""Linear layers of float32 models on the CPU by oneDNN, their weights laid out once as it reads them fastest.

torch multiplies float32 with MKL, from weights as they lie in the file; few rows, such as a query alone, suffer most.
The operators are those that torch.compile emits for a frozen model (torch._inductor.mkldnn_lowerings). They are no
public interface, so each layer is compared with what it was before it is replaced.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from millstream.broker.errors import described

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


class Prepacked(nn.Module):
    """A linear layer [.., in] -> [.., out] that holds its weights in oneDNN's own layout only."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self._weights = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weights, self.bias, "none", [], "")
        return product


def prepack(model: nn.Module) -> int:
    """Replace the linear layers of `model` where that is known to work, float32 on the CPU; returns how many."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    known = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    holders = {
        id(holder): holder
        for each in known
        if getattr(each.config, "model_type", None) in ARCHITECTURES
        for holder in each.modules()
    }
    # What is the weight of an embedding, too, stays where it is.
    uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    replaced = 0
    for holder in holders.values():
        for name, layer in holder.named_children():
            if type(layer) is nn.Linear and uses[id(layer.weight)] == 1 and (made := _prepacked(layer)):
                setattr(holder, name, made)
                replaced += 1
    return replaced


def _prepacked(layer: nn.Linear) -> Prepacked | None:
    weight = layer.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not weight.numel():
        return None
    try:
        with torch.inference_mode():
            made = Prepacked(layer)
            rows = torch.linspace(-1, 1, _ROWS * layer.in_features).view(_ROWS, -1)
            expected: Any = layer(rows)
            if (made(rows) - expected).norm() <= _CLOSE * expected.norm():
                return made
            log.warning("oneDNN's products differ from torch's: a linear layer stays as it is")
    except Exception as error:  # noqa: BLE001 - whatever it is, the layer may run as it ever did
        log.warning("oneDNN cannot take a linear layer, it stays as it is: %s", described(error))
    return None
