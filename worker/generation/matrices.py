"""Products of rows with the weights of linear layers: by torch, or by oneDNN with weights that are laid out for it.

Which one is faster depends on the CPU, the dtype and the sizes, so it is measured when a model is loaded. On the CPU
torch multiplies float32 with MKL, and lays out bfloat16 for oneDNN at every call. The operators of oneDNN are no public
interface: each product is compared with torch's own before it is used.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from millstream.broker.contract.errors import described

log = logging.getLogger(__name__)

SAMPLE = 4
"""Layers whose matrices are timed, at most."""

ROUNDS = 9
"""Times that each way multiplies the sample."""

FASTER = 0.9
"""oneDNN is used if it takes at most this part of torch's time: each of its layouts takes memory while it is made."""

_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative difference of two products, by dtype; oneDNN is used for no other."""

# oneDNN keeps a program for each shape of the weights and each number of rows: five for each number of texts that grow.
# Programs for parts of prompts only take memory: their numbers of rows seldom come again.
for _capacity in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "128")


class Product(NamedTuple):
    """A way to multiply rows [rows, in] with one matrix.

    `of` returns the product [rows, out]. `added` returns it plus its first argument [rows, out], which it may change.
    """

    of: Callable[[torch.Tensor], torch.Tensor]
    added: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Matrix:
    """The joined weights of linear layers that read the same input, and the product with them."""

    __slots__ = ("_bias", "_layers", "_packed", "_shared", "_weight", "added", "of")

    def __init__(self, *layers: nn.Linear, shared: bool = False) -> None:
        """Joins the weights of `layers`, which become views of them. `shared`: other modules use the weight, too."""
        self._layers, self._shared = layers, shared
        self._weight = _joined(layers, "weight")
        self._bias = None if layers[0].bias is None else _joined(layers, "bias")
        self._packed: torch.Tensor | None = None
        self._use(torchs(self._weight, self._bias))

    def _use(self, product: Product) -> None:
        self.of, self.added = product

    @property
    def parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [out, in], and bias [out] or None."""
        return self._weight, self._bias

    def pack(self) -> bool:
        """Lays out the weights for oneDNN. Returns False and changes nothing if the products differ. Raises anything.

        Unless they are shared, the layers have no weights then.
        """
        packed = torch.ops.mkldnn._reorder_linear_weight(self._weight)
        product = onednns(packed, self._bias)
        if not _are_equal(product, torchs(self._weight, self._bias), self._weight):
            return False
        self._packed = packed
        self._use(product)
        if not self._shared:
            self._weight = self._weight.new_empty(0)
            for layer in self._layers:
                layer.weight.data = self._weight
        return True

    def unpack(self) -> None:
        """Gives the layers their weights back, and leaves the product to torch."""
        if self._packed is None:
            return
        if not self._shared:
            self._weight = self._packed.to_dense()
            _split(self._layers, self._weight, "weight")
        self._packed = None
        self._use(torchs(self._weight, self._bias))


def torchs(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Returns the product as torch has it."""
    turned = weight.t()
    if bias is None:
        return Product(partial(torch.mm, mat2=turned), partial(torch.Tensor.addmm_, mat2=turned))
    return Product(partial(torch.addmm, bias, mat2=turned), lambda sums, rows: sums.addmm_(rows, turned).add_(bias))


def onednns(packed: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Returns the product as oneDNN has it. `packed`: the weights in its layout."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    return Product(
        lambda rows: pointwise.default(rows, packed, bias, "none", [], ""),
        lambda sums, rows: pointwise.binary(rows, sums, packed, bias, "add"),
    )


def pack_faster(matrices: Sequence[Matrix], rows: int) -> int:
    """Lays out `matrices`, of one shape, for oneDNN if it multiplies `rows` rows faster. Returns how many it has."""
    weight, _ = matrices[0].parameters
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    if weight.dtype not in _CLOSE or weight.device.type != "cpu" or not weight.numel():
        return 0
    packed = 0
    try:
        if _time_ratio(matrices[:SAMPLE], rows) <= FASTER:
            for matrix in matrices:
                packed += matrix.pack()
    except Exception as error:  # noqa: BLE001 - after any failure the remaining matrices are multiplied by torch
        log.warning("oneDNN cannot take this model's matrices: %s", described(error))
    return packed


@torch.inference_mode()
def _time_ratio(matrices: Sequence[Matrix], rows: int) -> float:
    """Returns the time of oneDNN's products, as a part of torch's."""
    own = [torchs(*each.parameters) for each in matrices]
    other = [onednns(torch.ops.mkldnn._reorder_linear_weight(weight), bias) for weight, bias in _parameters(matrices)]
    weight, _ = matrices[0].parameters
    values = torch.linspace(-1, 1, rows * weight.shape[1], dtype=weight.dtype).view(rows, -1)
    _seconds(own, values), _seconds(other, values)
    return median(_seconds(other, values) / _seconds(own, values) for _ in range(ROUNDS))


def _parameters(matrices: Sequence[Matrix]) -> Sequence[tuple[torch.Tensor, torch.Tensor | None]]:
    return [each.parameters for each in matrices]


def _seconds(products: Sequence[Product], rows: torch.Tensor) -> float:
    began = time.perf_counter()
    for each in products:
        each.of(rows)
    return time.perf_counter() - began


@torch.inference_mode()
def _are_equal(one: Product, other: Product, weight: torch.Tensor) -> bool:
    rows = torch.linspace(-1, 1, 5 * weight.shape[1], dtype=weight.dtype).view(5, -1)
    sums = torch.linspace(-1, 1, 5 * weight.shape[0], dtype=weight.dtype).view(5, -1)
    pairs = [(one.of(rows), other.of(rows)), (one.added(sums.clone(), rows), other.added(sums.clone(), rows))]
    close = _CLOSE[weight.dtype]
    return all(bool((a - b).float().norm() <= close * b.float().norm()) for a, b in pairs)


def _joined(layers: Sequence[nn.Linear], name: str) -> torch.Tensor:
    """Returns the parameters of that name as one tensor, and makes them views of it."""
    parameters: list[torch.Tensor] = [getattr(each, name).detach() for each in layers]
    if len(parameters) == 1:
        return parameters[0]
    joined = torch.cat(parameters)
    _split(layers, joined, name)
    return joined


def _split(layers: Sequence[nn.Linear], joined: torch.Tensor, name: str) -> None:
    at = 0
    for each in layers:
        rows = each.out_features
        getattr(each, name).data = joined[at : at + rows]
        at += rows
