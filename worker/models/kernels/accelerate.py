"""Decides which faster forwards a loaded model gets: packed texts and linear layers of oneDNN, or none."""

from __future__ import annotations

from torch import nn

from millstream.broker.config.spec import ModelSpec
from millstream.worker.models.kernels.linear import prepack
from millstream.worker.models.kernels.packing import Packing


def accelerate(model: nn.Module, spec: ModelSpec) -> Packing | None:
    """Replaces linear layers of `model` if possible, and returns its packing; None if it pads.

    With `kernels: off`, and for exported models, `model` stays as the library loaded it. Call it once, before the first
    forward. The fingerprint does not depend on `kernels`: each kernel is compared with the library's own forward before
    it is used, so results differ by rounding only, and vectors of both settings may be mixed.
    """
    if spec.kernels == "off" or spec.backend != "torch":
        return None
    prepack(model)
    return Packing.of(model)
