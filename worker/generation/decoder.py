"""The layers of Llama and its kin without transformers' modules: the same operations in fewer calls.

A step of a few tokens is short, and on the CPU most of its time is Python between the matrices. So the layers run here
as a flat list of calls, and matrices that read the same input are joined to one. `checks.py` compares the logits with
transformers' own before a model uses it; a model of another structure keeps transformers' forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm, silu
from transformers.activations import SiLUActivation

from millstream.worker.generation.attention import Groups
from millstream.worker.generation.kv_cache import BlockCache, BlockLayer

MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Types of models whose layers are known to be these."""

STATIC_ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary positions in which the rotation of a position does not depend on the length of the text."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""Multiplies rows [.., in] with a matrix: [.., out]."""


class Layer(NamedTuple):
    """One layer. `norms` of queries and keys: [heads, size], None if the layer has none. `joined`: those of attention.

    `gated`: the gate, then what it lets through.
    """

    before: torch.Tensor
    joined: Product
    norms: torch.Tensor | None
    out: Product
    after: torch.Tensor
    gated: Product
    down: Product


class Decoder:
    """Runs the layers of a model over the new tokens of many texts, as `Forward` lays them out. One thread.

    It shares the model's weights: where matrices are joined, the model's own become views of the joined one.
    """

    def __init__(self, model: Any, context: int) -> None:
        """`context`: longest text, in tokens."""
        core, config = model.model, model.config
        self._layers = [_layer(each) for each in core.layers]
        self._embedding = core.embed_tokens.weight.detach()
        self._head: Product = _product(model.lm_head)
        self._norm, self._epsilon = core.norm.weight.detach(), float(config.rms_norm_eps)
        self._normed = rms_norm if self._embedding.dtype != torch.float64 else _normed_as_float32
        attention = core.layers[0].self_attn
        self._size, self._scale = int(attention.head_dim), float(attention.scaling)
        self._queries, self._keys = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._rotations = _rotations(core.rotary_emb, context, self._embedding)

    @staticmethod
    def knows(model: Any) -> bool:
        """Whether the layers of `model` are those that a decoder runs."""
        config = model.config
        if config.model_type not in MODELS or not type(model).__module__.startswith("transformers.models."):
            return False
        core = model.model
        linears = [*(each for layer in core.layers for each in _projections(layer)), model.lm_head]
        return (
            getattr(core.rotary_emb, "rope_type", "") in STATIC_ROTATIONS
            and all(type(each) is nn.Linear for each in linears)
            and all(isinstance(layer.mlp.act_fn, nn.SiLU | SiLUActivation) for layer in core.layers)
        )

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: BlockCache, groups: Groups, last: torch.Tensor | None
    ) -> torch.Tensor:
        """Computes the tokens `ids` [tokens] at `positions` [tokens], and writes their keys and values to `cache`.

        Returns the logits [tokens, vocabulary]; of the tokens `last` only, unless it is None.
        """
        epsilon, normed = self._epsilon, self._normed
        rotations = self._rotations.index_select(0, positions)
        hidden = embedding(ids, self._embedding)
        width = hidden.shape[-1:]
        for layer, stored in zip(self._layers, cache.block_layers, strict=True):
            heads = layer.joined(normed(hidden, width, layer.before, epsilon)).view(len(ids), -1, self._size)
            read = self._attend(layer, heads, rotations, stored, groups)
            hidden = hidden + layer.out(read.view(len(ids), -1))
            gate, up = layer.gated(normed(hidden, width, layer.after, epsilon)).chunk(2, dim=-1)
            hidden = hidden + layer.down(silu(gate) * up)
        if last is not None:
            hidden = hidden.index_select(0, last)
        return self._head(normed(hidden, width, self._norm, epsilon))

    def _attend(
        self, layer: Layer, heads: torch.Tensor, rotations: torch.Tensor, stored: BlockLayer, groups: Groups
    ) -> torch.Tensor:
        """Returns what attention reads, [tokens, heads, size]. `heads`: queries, then keys, then values."""
        queries, turned = self._queries, self._queries + self._keys
        points = heads[:, :turned]
        if layer.norms is not None:
            points = self._normed(points, (self._size,), None, self._epsilon) * layer.norms
        points = _rotated(points, rotations)
        keys, values = stored.write(points[:, queries:], heads[:, turned:])
        read = [group.attend(points[:, :queries], keys, values, self._scale) for group in groups]
        return read[0] if len(read) == 1 else torch.cat(read)


def _normed_as_float32(
    rows: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """Normalises rows of float64 as transformers does. `rms_norm` itself would be more exact."""
    normed = rms_norm(rows.float(), shape, None, epsilon).double()
    return normed if weight is None else normed * weight


def _rotated(heads: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotates heads [tokens, heads, size] by `rotations` [tokens, 1, size / 2], complex.

    The two halves of a head are the coordinates of its points. They are interleaved in the result, which changes no
    product of a query and a key.
    """
    half = heads.shape[-1] // 2
    exact = heads if heads.dtype.itemsize >= 4 else heads.float()
    points = torch.complex(exact[..., :half], exact[..., half:]).mul_(rotations)
    return torch.view_as_real(points).flatten(-2).to(heads.dtype)


def _rotations(rotary: Any, context: int, like: torch.Tensor) -> torch.Tensor:
    """Returns the rotations of all positions as transformers computes them: complex [context, 1, size / 2]."""
    positions = torch.arange(context, device=like.device).unsqueeze(0)
    dtype = like.dtype if like.dtype.itemsize >= 4 else torch.float32
    with torch.no_grad():
        cosine, sine = rotary(torch.empty(0, dtype=dtype, device=like.device), position_ids=positions)
    half = cosine.shape[-1] // 2
    return torch.complex(cosine[0, :, :half], sine[0, :, :half]).unsqueeze(1)


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = None
    if hasattr(attention, "q_norm"):
        size = attention.head_dim
        counts = [each.out_features // size for each in (attention.q_proj, attention.k_proj)]
        weights = (attention.q_norm.weight, attention.k_norm.weight)
        norms = torch.cat([weight.detach().expand(n, -1) for weight, n in zip(weights, counts, strict=True)])
    return Layer(
        layer.input_layernorm.weight.detach(),
        _joined(_attention(layer)),
        norms,
        _product(attention.o_proj),
        layer.post_attention_layernorm.weight.detach(),
        _joined(_gated(layer)),
        _product(mlp.down_proj),
    )


def _attention(layer: Any) -> Sequence[nn.Linear]:
    return (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)


def _gated(layer: Any) -> Sequence[nn.Linear]:
    return (layer.mlp.gate_proj, layer.mlp.up_proj)


def _projections(layer: Any) -> Iterable[nn.Linear]:
    return (*_attention(layer), layer.self_attn.o_proj, *_gated(layer), layer.mlp.down_proj)


def _product(layer: nn.Linear) -> Product:
    return partial(linear, weight=layer.weight.detach(), bias=None if layer.bias is None else layer.bias.detach())


def _joined(layers: Sequence[nn.Linear]) -> Product:
    """Returns the product of linear layers of one input, joined, and makes their weights views of its own."""
    weight = _joined_parameters(layers, "weight")
    return partial(linear, weight=weight, bias=None if layers[0].bias is None else _joined_parameters(layers, "bias"))


def _joined_parameters(layers: Sequence[nn.Linear], name: str) -> torch.Tensor:
    parameters = [getattr(each, name) for each in layers]
    joined, at = torch.cat([each.detach() for each in parameters]), 0
    for each in parameters:
        each.data = joined[at : at + len(each)]
        at += len(each)
    return joined
