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
from torch.linalg import vector_norm
from torch.nn.functional import embedding, rms_norm, silu
from transformers.activations import SiLUActivation

from millstream.worker.generation.attention import Groups
from millstream.worker.generation.columns import Together
from millstream.worker.generation.kv_cache import BlockCache
from millstream.worker.generation.matrices import Matrix, pack_faster

MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Types of models whose layers are known to be these."""

STATIC_ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary positions in which the rotation of a position does not depend on the length of the text."""

Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Normalises rows, and multiplies them with weights."""


class Layer(NamedTuple):
    """One layer. `norms` of queries and keys: [heads, size], None if the layer has none. `joined`: those of attention.

    `gated`: the gate, then what it lets through.
    """

    before: torch.Tensor
    joined: Matrix
    norms: torch.Tensor | None
    out: Matrix
    after: torch.Tensor
    gated: Matrix
    down: Matrix

    @property
    def matrices(self) -> Sequence[Matrix]:
        return self.joined, self.out, self.gated, self.down


class Decoder:
    """Runs the layers of a model over the new tokens of many texts, as `Forward` lays them out. One thread.

    It shares the model's weights: where matrices are joined, the model's own become views of the joined one. Those of
    queries and keys are reordered, so until `release` the model's own forward does not work.
    """

    def __init__(self, model: Any, context: int) -> None:
        """`context`: longest text, in tokens."""
        core, config = model.model, model.config
        self._core = core
        self._layers = [_layer(each) for each in core.layers]
        self._embedding = core.embed_tokens.weight.detach()
        self._head = Matrix(model.lm_head, shared=model.lm_head.weight is core.embed_tokens.weight)
        self._norm = core.norm.weight.detach()
        self._normed = _norm_of(self._embedding, float(config.rms_norm_eps))
        attention = core.layers[0].self_attn
        self._size, self._scale = int(attention.head_dim), float(attention.scaling)
        self._queries = int(config.num_attention_heads)
        self._turn = self._queries + int(config.num_key_value_heads)
        self._rotations = _rotations(core.rotary_emb, context, self._embedding)
        self._reorder(_interleaved(self._size))

    def pack(self, rows: int) -> int:
        """Uses oneDNN's products for matrices that it multiplies faster with `rows` rows. Returns their number."""
        kinds = zip(*(each.matrices for each in self._layers), strict=True)
        return sum(pack_faster(matrices, rows) for matrices in (*kinds, [self._head]))

    def unpack(self) -> None:
        """Uses torch's products for all matrices."""
        for matrix in (*(each for layer in self._layers for each in layer.matrices), self._head):
            matrix.unpack()

    def release(self) -> None:
        """Makes the model's own forward work again. Then the decoder does not."""
        self.unpack()
        self._reorder(_interleaved(self._size).argsort())

    def _reorder(self, order: torch.Tensor) -> None:
        for layer in self._core.layers:
            if not hasattr(layer.self_attn, "q_norm"):
                _reorder(layer, order)

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
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: BlockCache,
        groups: Groups,
        last: torch.Tensor | None,
        together: Together | None = None,
    ) -> torch.Tensor:
        """Computes the tokens `ids` [tokens] at `positions` [tokens], and writes their keys and values to `cache`.

        `groups` attend for all tokens behind those of `together`, if that is not None. Returns the logits [tokens,
        vocabulary]; of the tokens `last` only, unless it is None.
        """
        normed, tokens, size = self._normed, len(ids), self._size
        rotations = self._rotations.index_select(0, positions)
        hidden = embedding(ids, self._embedding)
        copies = together.layers if together else [None] * len(self._layers)
        for layer, stored, copy in zip(self._layers, cache.block_layers, copies, strict=True):
            heads = self._turned(layer, layer.joined.of(normed(hidden, layer.before)).view(tokens, -1, size), rotations)
            keys, values = stored.write(heads[:, self._queries : self._turn], heads[:, self._turn :])
            read = [together.attend(copy, heads[: together.texts], self._scale)] if together and copy else []
            if groups:
                queries = heads[:, : self._queries]
                read += [group.attend(queries, keys, values, self._scale) for group in groups]
            hidden = layer.out.added(hidden, (read[0] if len(read) == 1 else torch.cat(read)).view(tokens, -1))
            gate, up = layer.gated.of(normed(hidden, layer.after)).chunk(2, dim=-1)
            hidden = layer.down.added(hidden, silu(gate).mul_(up))
        if last is not None:
            hidden = hidden.index_select(0, last)
        return self._head.of(normed(hidden, self._norm))

    def _turned(self, layer: Layer, heads: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        """Normalises and rotates queries and keys. `heads`: [tokens, heads, size], queries, then keys, then values.

        It is changed.
        """
        points = heads[:, : self._turn]
        if layer.norms is not None:
            # Only here the halves of a head come to alternate: the norm's sums are in the order of transformers.
            halves = self._normed(points, layer.norms).view(*points.shape[:2], 2, -1)
            points.view(*points.shape[:2], -1, 2).copy_(halves.transpose(2, 3))
        _rotate(points, rotations)
        return heads


def _norm_of(like: torch.Tensor, epsilon: float) -> Norm:
    """Returns the norm for activations like `like`."""
    if like.dtype is torch.float64:
        return partial(_normed_as_float32, epsilon)
    if like.dtype is torch.float32 and like.device.type == "cpu":
        return partial(_normed_in_few_calls, torch.tensor([epsilon]))
    return partial(_normed, epsilon)


def _normed(epsilon: float, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    size = weight.shape[-1:]
    return rms_norm(rows, size, weight, epsilon) if weight.dim() == 1 else rms_norm(rows, size, None, epsilon) * weight


def _normed_as_float32(epsilon: float, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Normalises rows of float64 as transformers does. `rms_norm` itself would be more exact."""
    return rms_norm(rows.float(), weight.shape[-1:], None, epsilon).double() * weight


def _normed_in_few_calls(epsilon: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Takes 60 % of the time of `rms_norm`, which on the CPU is eight calls. The sums are those of float32, too."""
    length = vector_norm(rows, 2, -1, True)
    inverse = torch.addcmul(epsilon, length, length, value=1 / rows.shape[-1]).rsqrt_()
    return (rows * inverse).mul_(weight)


def _rotate(heads: torch.Tensor, rotations: torch.Tensor) -> None:
    """Rotates heads [tokens, heads, size] by `rotations` [tokens, 1, size / 2], complex, in place.

    Neighbours in a head are the coordinates of a point.
    """
    points = heads.view(*heads.shape[:2], -1, 2)
    if heads.dtype.itemsize >= 4:
        torch.view_as_complex(points).mul_(rotations)
        return
    # There are no complex numbers of lower precision.
    points.copy_(torch.view_as_real(torch.view_as_complex(points.float()).mul_(rotations)))


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
    size = attention.head_dim
    norms = None
    if hasattr(attention, "q_norm"):
        counts = [each.out_features // size for each in (attention.q_proj, attention.k_proj)]
        weights = (attention.q_norm.weight, attention.k_norm.weight)
        norms = torch.cat([weight.detach().expand(n, -1) for weight, n in zip(weights, counts, strict=True)])
    return Layer(
        layer.input_layernorm.weight.detach(),
        Matrix(*_attention(layer)),
        norms,
        Matrix(attention.o_proj),
        layer.post_attention_layernorm.weight.detach(),
        Matrix(*_gated(layer)),
        Matrix(mlp.down_proj),
    )


def _interleaved(size: int) -> torch.Tensor:
    """Returns an order of a head's coordinates in which the halves alternate: so the two of a point are neighbours.

    If queries and keys have the same order, their products are as they were.
    """
    return torch.arange(size).view(2, -1).t().flatten()


def _reorder(layer: Any, order: torch.Tensor) -> None:
    """Changes the order of the coordinates of a layer's queries and keys."""
    for each in _attention(layer)[:2]:
        for parameter in (each.weight, each.bias):
            if parameter is not None:
                heads = parameter.data.view(-1, len(order), *parameter.shape[1:])
                heads.copy_(heads[:, order.to(heads.device)])


def _attention(layer: Any) -> Sequence[nn.Linear]:
    return (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)


def _gated(layer: Any) -> Sequence[nn.Linear]:
    return (layer.mlp.gate_proj, layer.mlp.up_proj)


def _projections(layer: Any) -> Iterable[nn.Linear]:
    return (*_attention(layer), layer.self_attn.o_proj, *_gated(layer), layer.mlp.down_proj)
