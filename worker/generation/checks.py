"""Refuses models that the engine would run wrongly, and proves the others: by their layers, then by their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from millstream.broker.contract.errors import ModelUnavailable, described
from millstream.worker.generation.attention import NAME
from millstream.worker.generation.blocks import BLOCK
from millstream.worker.generation.forward import Forward, Span

FULL = "full_attention"
"""Type of a layer in which each token attends to all tokens before it. The engine runs no other."""

MOST_TOKENS = BLOCK + 16
"""Tokens of the longer text of the proof: it fills a block and begins the next."""

_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
_CLOSE_ENOUGH = 5e-2
"""Largest relative difference of the logits of two forwards: by dtype on the CPU, and for all others."""

_HINT = "run it with a server of its own, such as vLLM"


def refuse_layers(name: str, config: PretrainedConfig) -> None:
    """Raises ModelUnavailable, which names the type of the first layer that the engine cannot run."""
    if config.is_encoder_decoder:
        raise ModelUnavailable(f"{name!r} has an encoder and a decoder; only decoders can be run", hint=_HINT)
    for at, kind in enumerate(layer_types(config)):
        if kind != FULL:
            raise ModelUnavailable(f"layer {at} of {name!r} is of type {kind}; only {FULL} can be run", hint=_HINT)


def layer_types(config: PretrainedConfig) -> Sequence[str]:
    """Returns the type of each layer, by the names that transformers has for them."""
    decoder: Any = config.get_text_config(decoder=True)
    named = getattr(decoder, "layer_types", None) or getattr(decoder, "layers_block_type", None)
    if named:
        return [FULL if each == "attention" else str(each) for each in named]
    kind = FULL
    for field, other in _OTHERS.items():
        if getattr(decoder, field, None) is not None:
            kind = other
            break
    return [kind] * int(getattr(decoder, "num_hidden_layers", 0))


_OTHERS = {
    "sliding_window": "sliding_attention",
    "attention_chunk_size": "chunked_attention",
    "index_topk": "indexed_attention",
    "state_size": "state_space",
    "ssm_state_size": "state_space",
}
"""Fields of a config, and the type of layer that each stands for if the config names no types."""


def refuse_model(name: str, model: Any) -> None:
    """Raises ModelUnavailable if `model` keeps another state than keys and values, or has attention of its own."""
    if getattr(model, "_is_stateful", False):
        raise ModelUnavailable(f"{name!r} has layers of type state_space; only {FULL} can be run", hint=_HINT)
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelUnavailable(
            f"the attention of {type(model).__name__} cannot be replaced, so {name!r} cannot be run", hint=_HINT
        )


class Proof:
    """Two texts whose logits by transformers' own forward are compared with those of the engine's forwards."""

    def __init__(self, name: str, model: Any, context: int) -> None:
        """Computes the logits. Call it before `use_blocks`. Raises ModelUnavailable if the model fails."""
        self._name = name
        vocabulary = int(model.config.get_text_config().vocab_size)
        longer = max(4, min(MOST_TOKENS, context))
        self._texts = [_ids(length, vocabulary) for length in (longer, max(4, longer // 2))]
        try:
            with torch.inference_mode():
                self._expected = [_plain(model, text) for text in self._texts]
        except Exception as error:
            raise ModelUnavailable(f"{name!r} fails on a plain text: {described(error)}") from error
        if not all(bool(each.isfinite().all()) for each in self._expected):
            raise ModelUnavailable(
                f"{name!r} answers NaN or infinity to a plain text", hint="check its weights; try dtype: float32"
            )

    def check(self, forward: Forward) -> None:
        """Runs both texts together, in parts and token by token. Raises ModelUnavailable if the logits differ."""
        try:
            differences = self._differences(forward)
        except Exception as error:
            raise ModelUnavailable(
                f"{self._name!r} cannot be run over a cache in blocks: {described(error)}", hint=_HINT
            ) from error
        close = _CLOSE.get(forward.dtype, _CLOSE_ENOUGH) if forward.device.type == "cpu" else _CLOSE_ENOUGH
        if not max(differences) <= close:
            raise ModelUnavailable(
                f"the logits of {self._name!r} over a cache in blocks differ by {max(differences):.2g} from those of "
                f"transformers, more than {close:g}",
                hint=_HINT,
            )

    def _differences(self, forward: Forward) -> list[float]:
        one, other = self._texts
        first, second = len(one) // 3, min(len(other) // 2, len(other) - 3)
        blocks = ([3, 1], [2])

        def span(text: int, begin: int, end: int) -> Span:
            return Span(self._texts[text][begin:end], begin, blocks[text], True, text)

        steps = [
            [span(0, 0, first)],
            [span(0, first, first + 1), span(1, 0, second)],
            [span(1, second, second + 1), span(0, first + 1, len(one) - 2)],
            # Both grow, and go on growing.
            [span(1, second + 1, second + 2), span(0, len(one) - 2, len(one) - 1)],
            [span(1, second + 2, second + 3), span(0, len(one) - 1, len(one))],
        ]
        forward.cache.grow(3, 3)
        found = []
        for spans in ([each for each in spans if each.ids] for spans in steps):
            for span_, logits in zip(spans, forward.run(spans), strict=True):
                expected = self._expected[0 if span_.blocks is blocks[0] else 1][span_.end - 1]
                found.append(float((logits - expected).norm() / expected.norm().clamp(min=1e-9)))
        return found


def _ids(length: int, vocabulary: int) -> list[int]:
    return [(7 * at * at + 11 * at + 3) % vocabulary for at in range(length)]


def _plain(model: Any, ids: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[0]


def use_blocks(name: str, model: Any) -> None:
    """Makes `model` attend over blocks. Raises ModelUnavailable."""
    try:
        model.set_attn_implementation(NAME)
    except Exception as error:
        raise ModelUnavailable(
            f"the attention of {name!r} cannot be replaced: {described(error)}", hint=_HINT
        ) from error
