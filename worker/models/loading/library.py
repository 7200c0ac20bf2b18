"""Loads models with transformers and sentence-transformers: from safetensors only, and no code of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models.loading.exports import check_runs, find_export
from millstream.worker.models.loading.folder import Folder
from millstream.worker.models.loading.weights import check_rows, missing_tensors, reads_pooler, whole_weights

# Progress bars of several processes garble a terminal; a worker logs one line when it is ready.
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

Loaded = SentenceTransformer | SparseEncoder
M = TypeVar("M", bound=torch.nn.Module)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}

_KINDS: Mapping[str, type[Loaded]] = {"SentenceTransformer": SentenceTransformer, "SparseEncoder": SparseEncoder}

MAX_REASON_CHARS = 500
"""Most characters of a library's error message that are passed on."""

LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    KeyError,
    AttributeError,
    AssertionError,
    SafetensorError,
)
"""Exceptions of the model libraries for a model that they cannot load."""


def load_error(error: Exception, spec: ModelSpec, device: str | None) -> ModelUnavailable:
    """Returns the error of a model that could not be loaded because of `error`."""
    # All lines of the message: the first line often does not name the cause.
    reason = " ".join(str(error).split())[:MAX_REASON_CHARS] or type(error).__name__
    return ModelUnavailable(
        f"cannot load {spec.model_name!r} on {device or 'auto'}: {reason}",
        hint="check model_name, revision, device, attention and backend",
    )


def dtype_of(model: torch.nn.Module) -> torch.dtype | None:
    """Returns the dtype of the weights; None if torch holds no weights."""
    first = next(model.parameters(), None)
    return None if first is None else first.dtype


def token_limit(tokenizer: Any, config: Any) -> int:
    """Returns the limit in tokens that the model's files name."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or -1
    most = int(tokenizer.model_max_length)
    return min(most, positions) if positions > 0 else most


def load_encoder(source: Path, spec: ModelSpec, device: str | None) -> Loaded:
    """Loads the embedding model, dense or sparse, in a folder. Raises ModelUnavailable."""
    try:
        kind = _kind(source)
    except LOAD_ERRORS as error:
        raise load_error(error, spec, device) from error
    return load_model(kind, source, spec, device)


def load_model(kind: type[M], source: Path, spec: ModelSpec, device: str | None) -> M:
    """Loads a model of `kind`, a class of sentence-transformers. Raises ModelUnavailable."""
    place, kwargs = device, model_kwargs(spec)
    if spec.backend != "torch":
        place, kwargs = find_export(source, spec, device, kind.__name__)
    make: Callable[..., M] = kind
    try:
        with whole_weights(spec.model_name, allow_missing_pooler=kind is not CrossEncoder) as missing_poolers:
            model = make(
                str(source),
                device=None if place in (None, "auto") else place,
                trust_remote_code=False,
                backend=spec.backend,
                model_kwargs=kwargs,
            )
    except ModelUnavailable:
        raise
    except Exception as error:
        # Errors of tokenizers, ONNX Runtime and OpenVINO have no common type.
        raise load_error(error, spec, device) from error
    if missing_poolers and reads_pooler(model):
        raise missing_tensors(spec.model_name, missing_poolers)
    check_rows(model, spec.model_name)
    if spec.backend != "torch":
        check_runs(model, spec)
    model.eval()
    return model


def model_kwargs(spec: ModelSpec) -> dict[str, Any]:
    """Returns the arguments of from_pretrained for dtype, attention and safetensors."""
    kwargs: dict[str, Any] = {"dtype": _DTYPES[spec.dtype], "use_safetensors": True}
    if spec.attention != "auto":
        kwargs["attn_implementation"] = spec.attention
    return kwargs


def _kind(source: Path) -> type[Loaded]:
    """Returns the class that the model's settings name; dense by default. Raises ModelUnavailable for other kinds."""
    name = Folder(source).settings().get("model_type", "SentenceTransformer")
    if name not in _KINDS:
        raise ModelUnavailable(f"{str(source)!r} is a {name}, no embedding model", hint=f"one of {', '.join(_KINDS)}")
    return _KINDS[name]
