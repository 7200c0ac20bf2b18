"""Loads causal language models and their tokenizers, whole, and without code of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sentence_transformers.util import get_device_name
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from millstream.broker.config.load import ModelSpec
from millstream.worker.models.loading.folder import Folder
from millstream.worker.models.loading.library import LOAD_ERRORS, load_error, model_kwargs
from millstream.worker.models.loading.weights import whole_weights


def load_causal(
    folder: Folder,
    spec: ModelSpec,
    device: str | None,
    check: Callable[[PretrainedConfig], object] = lambda config: None,
) -> tuple[Any, Any]:
    """Returns the tokenizer and the model. `check` may refuse the model by its config, before the weights are loaded.

    Raises ModelUnavailable, or what `check` raises.
    """
    source = str(folder.source)
    try:
        check(AutoConfig.from_pretrained(source, trust_remote_code=False))
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        with whole_weights(spec.model_name):
            model: Any = AutoModelForCausalLM.from_pretrained(source, **model_kwargs(spec), trust_remote_code=False)
        model.eval().to(get_device_name() if device in (None, "auto") else device)
        return tokenizer, model
    except LOAD_ERRORS as error:
        raise load_error(error, spec, device) from error
