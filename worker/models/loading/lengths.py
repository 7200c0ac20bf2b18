"""Models that compute differently from some length on, and keep to it: transformers has two kinds of them.

Dynamic and "longrope" rotary positions choose their frequencies by the longest text of a forward; the dynamic ones keep
those of the longest text they ever ran. BigBird's sparse attention turns into full attention for ever with its first
short text. Here each forward starts as that of a model just loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn

UNLIMITED = float("inf")


def forget(model: nn.Module) -> float:
    """Make each forward of `model` independent of those before it; call it once.

    Returns up to how many tokens texts of different lengths compute alike.
    """
    return min((UNLIMITED, *(_forgetting(module) for module in model.modules())))


def _forgetting(module: Any) -> float:
    """The limit that `module` sets. It forgets from now on."""
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
    """The kinds of rotary positions that `module` computes, by the type of layer; by "" if it has one kind."""
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
    # transformers 4 has the number beside the parameters.
    parameters = getattr(module.config, "rope_parameters", None) or vars(module.config)
    for layer, kind in kinds.items():
        if kind == "longrope":
            yield int((parameters[layer] if layer else parameters)["original_max_position_embeddings"])


def _sparse_from(module: Any) -> float:
    """Chooses the attention as BigBirdModel.forward does."""
    if not hasattr(module, "get_input_embeddings"):
        return UNLIMITED
    most = (5 + 2 * module.config.num_random_blocks) * module.config.block_size
    forward = module.forward

    # No hook: sentence-transformers calls this method itself, past all hooks.
    @wraps(forward)
    def sparse_again(*given: torch.Tensor, **named: Any) -> object:
        ids = given[0] if given else named["input_ids"]
        if ids.shape[1] > most:
            module.set_attention_type("block_sparse")
        return forward(*given, **named)

    module.forward = sparse_again
    return float(most)
