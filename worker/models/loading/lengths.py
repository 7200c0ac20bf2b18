"""Resets models that keep state between forwards: transformers has two kinds that compute by the length of a text.

Dynamic and "longrope" rotary positions choose their frequencies by the longest text of a forward; the dynamic ones keep
the frequencies of the longest text so far. BigBird's sparse attention becomes full attention permanently at its first
short text. After `forget` each forward computes like the first forward of a newly loaded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn

UNLIMITED = float("inf")
"""Tokens: texts of all lengths compute alike."""


def forget(model: nn.Module) -> float:
    """Makes each forward of `model` independent of earlier forwards. Call it once.

    Returns the length in tokens up to which texts of different lengths compute alike.
    """
    return min((UNLIMITED, *(_make_independent(module) for module in model.modules())))


def _make_independent(module: Any) -> float:
    """Makes the forwards of `module` independent of each other. Returns its limit in tokens, as `forget` does."""
    kinds = _rope_kinds(module)
    if any("dynamic" in kind for kind in kinds.values()):
        module.register_forward_pre_hook(_forget_frequencies)
        return float(module.original_max_seq_len)
    if "longrope" in kinds.values():
        return float(min(_long_from(module, kinds)))
    if isinstance(module, nn.Module) and getattr(module, "attention_type", None) == "block_sparse":
        return _sparse_from(module)
    return UNLIMITED


def _rope_kinds(module: object) -> Mapping[str, str]:
    """Returns the kinds of rotary positions of `module` by layer type; the key is "" if it has one kind."""
    kinds = getattr(module, "rope_type", None)
    if not hasattr(module, "original_max_seq_len") or kinds is None:
        return {}
    return kinds if isinstance(kinds, Mapping) else {"": str(kinds)}


def _forget_frequencies(module: Any, _: object) -> None:
    for kind in _rope_kinds(module):
        prefix = f"{kind}_" if kind else ""
        if getattr(module, f"{prefix}max_seq_len_cached", module.max_seq_len_cached) == module.original_max_seq_len:
            continue
        buffer: torch.Tensor = getattr(module, f"{prefix}inv_freq")
        module.register_buffer(
            f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(buffer.device), persistent=False
        )
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _long_from(module: Any, kinds: Mapping[str, str]) -> Iterable[int]:
    # transformers 4 has no rope_parameters: the number is in the config itself.
    parameters = getattr(module.config, "rope_parameters", None) or vars(module.config)
    for layer, kind in kinds.items():
        if kind == "longrope":
            yield int((parameters[layer] if layer else parameters)["original_max_position_embeddings"])


def _sparse_from(module: Any) -> float:
    """Makes `module` choose attention for each forward, as BigBirdModel.forward does. Returns its limit in tokens."""
    if not hasattr(module, "get_input_embeddings"):
        return UNLIMITED
    most = (5 + 2 * module.config.num_random_blocks) * module.config.block_size
    forward = module.forward

    # Not a hook: sentence-transformers calls `forward` directly, so hooks do not run.
    @wraps(forward)
    def sparse_again(*args: torch.Tensor, **kwargs: Any) -> object:
        ids = args[0] if args else kwargs["input_ids"]
        if ids.shape[1] > most:
            module.set_attention_type("block_sparse")
        return forward(*args, **kwargs)

    module.forward = sparse_again
    return float(most)
