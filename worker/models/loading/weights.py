"""Makes incomplete weights an error: transformers only warns, and fills missing tensors with random numbers."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn
from transformers import PreTrainedModel

from millstream.broker.contract.errors import ModelUnavailable

_LOADING = threading.Lock()

_POOLER = re.compile(r"(^|\.)pooler\.")

_CONSTANT = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|(attn|attention)\.bias)$")
"""Names of positions and causal masks: old checkpoints contain them, but models compute them."""

_HINT = "copy or download the folder again, whole; if it was saved with other names or sizes, save it again"


@contextmanager
def whole_weights(name: str, allow_missing_pooler: bool = False) -> Iterator[set[str]]:
    """Makes `from_pretrained` of any model raise ModelUnavailable if a tensor is missing, unexpected, or misshapen.

    With `spares_pooler` the pooler may be missing: sentence-transformers pools by a module of its own, and many
    published encoders were saved without. It is NaN then, so that an answer that used it is no number. Yields the names
    of such tensors. sentence-transformers does not pass `output_loading_info` on, hence the wrapper.
    """
    missing_poolers: set[str] = set()
    with _LOADING:
        original = PreTrainedModel.__dict__["from_pretrained"]

        def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
            # With ignore_mismatched_sizes it lists these tensors; without, its error does not name them.
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, info = original.__get__(None, cls)(*args, **kwargs)
            missing_poolers.update(_check(model, info, name, allow_missing_pooler))
            return model

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]
        try:
            yield missing_poolers
        finally:
            PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


def _check(model: PreTrainedModel, info: dict[str, Any], name: str, allow_missing_pooler: bool) -> set[str]:
    """Returns the missing tensors of a pooler, if allowed. Raises ModelUnavailable for any other fault."""
    constants = {each for each, _ in model.named_buffers()}
    missing = {key for key in info["missing_keys"] if key not in constants or "running_" in key}
    poolers = {key for key in missing if _POOLER.search(key)} if allow_missing_pooler else set()
    misshapen = [f"{key} {_size(saved)}, not {_size(own)}" for key, saved, own in info["mismatched_keys"]]
    unexpected = {key for key in info["unexpected_keys"] if _is_own(key, model, constants)}
    if missing - poolers:
        raise missing_tensors(name, missing - poolers)
    for what, keys in (
        ("have a tensor of another shape,", misshapen),
        ("have a tensor that the model has no place for,", unexpected),
        ("cannot be loaded:", info["error_msgs"]),
    ):
        if keys:
            raise ModelUnavailable(f"the weights of {name!r} {what} {_list(keys)}", hint=_HINT)
    _spoil(model, poolers)
    return poolers


def missing_tensors(name: str, keys: Iterable[str]) -> ModelUnavailable:
    """Returns the error of a model without the tensors `keys`."""
    return ModelUnavailable(f"the weights of {name!r} lack the tensor {_list(keys)}", hint=_HINT)


def _is_own(key: str, model: PreTrainedModel, constants: set[str]) -> bool:
    """Returns whether an unexpected tensor belongs to the base model, for example to a layer too many.

    Other tensors belong to a head for another task: a checkpoint of that task contains its head, also beside the
    model's own head. A pooler counts as a head.
    """
    prefix = model.base_model_prefix
    bare = key.removeprefix(f"{prefix}.")
    base = getattr(model, prefix, model)
    if _POOLER.search(key) or _CONSTANT.search(key) or {key, bare, f"{prefix}.{key}"} & constants:
        return False
    own = {prefix, *(each for each, _ in base.named_children())}
    return bool({key.partition(".")[0], bare.partition(".")[0]} & own)


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "()"


def _list(keys: Iterable[str]) -> str:
    first, *others = sorted(map(str, keys))
    return f"{first} and {len(others)} more" if others else first


def _spoil(model: nn.Module, names: Iterable[str]) -> None:
    with torch.no_grad():
        for parameter in map(model.get_parameter, names):
            if parameter.is_floating_point():
                parameter.fill_(float("nan"))


def reads_pooler(model: nn.Module) -> bool:
    """Returns whether a module of sentence-transformers reads the output of the transformer's own pooler."""
    methods = (getattr(module, "modality_config", None) or {} for module in model.modules())
    return any(each.get("method_output_name") == "pooler_output" for config in methods for each in config.values())


def check_rows(model: nn.Module, name: str) -> None:
    """Raises ModelUnavailable if a static embedding, whose size comes from the file, has too few rows."""
    for module in model.modules():
        table = getattr(module, "embedding", None)
        if not isinstance(module, StaticEmbedding) or not isinstance(table, nn.EmbeddingBag):
            continue
        tokens = module.tokenizer.get_vocab_size()
        if tokens > table.num_embeddings:
            raise ModelUnavailable(
                f"embedding.weight of {name!r} has {table.num_embeddings} rows, its tokenizer.json has {tokens} tokens",
                hint=_HINT,
            )
