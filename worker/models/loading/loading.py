"""Loading, for all kinds of models: safetensors only, no code that a model brings; what a folder says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models.kernels.linear import prepack
from millstream.worker.models.loading.exports import check_runs, export_digest, exported, find
from millstream.worker.models.loading.files import refused
from millstream.worker.models.loading.source import settings_digest, weights_digest
from millstream.worker.models.loading.weights import check_rows, lacking, reads_pooler, whole_weights
from millstream.worker.models.loading.whole import SETTINGS

# A worker logs one line when it is ready; bars of many processes only garble a terminal.
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

Loaded = SentenceTransformer | SparseEncoder
M = TypeVar("M", bound=torch.nn.Module)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}

_KINDS: Mapping[str, type[Loaded]] = {"SentenceTransformer": SentenceTransformer, "SparseEncoder": SparseEncoder}

MOST_REASON = 500
"""Most characters of a library's own error that are passed on."""

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
"""What the model libraries raise where there is nothing they can load."""


def unavailable(error: Exception, spec: ModelSpec, device: str | None) -> ModelUnavailable:
    """The error of a model that could not be loaded, for one of LOAD_ERRORS."""
    # All of its lines: the first one often names nothing.
    reason = " ".join(str(error).split())[:MOST_REASON] or type(error).__name__
    return ModelUnavailable(
        f"cannot load {spec.model_name!r} on {device or 'auto'}: {reason}",
        hint="check model_name, revision, device, attention and backend",
    )


def dtype_of(model: torch.nn.Module) -> torch.dtype | None:
    """That of the weights; None where torch holds none."""
    first = next(model.parameters(), None)
    return None if first is None else first.dtype


def longest(tokenizer: Any, config: Any) -> int:
    """The most tokens a model reads."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or -1
    most = int(tokenizer.model_max_length)
    return min(most, positions) if positions > 0 else most


def load(source: Path, spec: ModelSpec, device: str | None) -> Loaded:
    """The embedding model, dense or sparse, in a folder. Raises ModelUnavailable."""
    try:
        kind = _kind(source)
    except LOAD_ERRORS as error:
        raise unavailable(error, spec, device) from error
    return loaded(kind, source, spec, device)


def loaded(kind: type[M], source: Path, spec: ModelSpec, device: str | None) -> M:
    """The same, known to be of `kind`: any that sentence-transformers has."""
    where, kwargs = device, model_kwargs(spec)
    if spec.backend != "torch":
        where, kwargs = find(source, spec, device, kind.__name__)
    make: Callable[..., M] = kind
    try:
        with whole_weights(spec.model_name, spares_pooler=kind is not CrossEncoder) as spared:
            model = make(
                str(source),
                device=None if where in (None, "auto") else where,
                trust_remote_code=False,
                backend=spec.backend,
                model_kwargs=kwargs,
            )
    except ModelUnavailable:
        raise
    except Exception as error:
        # The tokenizers, ONNX Runtime and OpenVINO have errors of no common type.
        raise unavailable(error, spec, device) from error
    if spared and reads_pooler(model):
        raise lacking(spec.model_name, spared)
    check_rows(model, spec.model_name)
    if spec.backend != "torch":
        check_runs(model, spec)
    model.eval()
    prepack(model)
    return model


def model_kwargs(spec: ModelSpec) -> dict[str, Any]:
    """How the weights are to be loaded, as from_pretrained takes it."""
    kwargs: dict[str, Any] = {"torch_dtype": _DTYPES[spec.dtype], "use_safetensors": True}
    if spec.attention != "auto":
        kwargs["attn_implementation"] = spec.attention
    return kwargs


def _kind(source: Path) -> type[Loaded]:
    """What the model's own settings say it is; dense where they say nothing."""
    name = Folder(source).settings().get("model_type", "SentenceTransformer")
    if name not in _KINDS:
        raise ModelUnavailable(f"{str(source)!r} is a {name}, no embedding model", hint=f"one of {', '.join(_KINDS)}")
    return _KINDS[name]


class Folder(NamedTuple):
    """Where a model is, and what it says of itself there. `revision` is the one asked for on the hub."""

    source: Path
    revision: str | None = None

    def read(self, file: str) -> Any:
        """The JSON of `file`; None where the model has no such file. Raises one of LOAD_ERRORS."""
        path = self.source / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def settings(self) -> dict[str, Any]:
        """What sentence-transformers wrote beside the weights; empty for other models."""
        return self.read(SETTINGS) or {}

    def prompt(self) -> str:
        """What goes before a query by default; for a model that chats, the system's message."""
        settings = self.settings()
        name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
        if name and name not in prompts:
            raise refused(
                self.source / SETTINGS, f"it has no prompt {name!r}, its default one", "add it, or name another"
            )
        return prompts.get(name) or ""

    def chat_settings(self) -> dict[str, Any]:
        """The arguments of the chat template."""
        kwargs = (self.read("sentence_bert_config.json") or {}).get("processing_kwargs") or {}
        return kwargs.get("chat_template") or {}

    def fingerprint(self, spec: ModelSpec, dtype: torch.dtype | None, *what: str) -> str:
        """Names the weights, by 16 hex digits, what else counts, by 8, the revision asked for, and how it all runs."""
        digest = f"{self._weights(spec)[:16]}+{settings_digest(self.source)[:8]}"
        revision = f"@{self.revision}" if self.revision else ""
        runs = str(dtype).removeprefix("torch.") if spec.backend == "torch" else spec.backend
        return " ".join([digest + revision, runs, *what])

    def _weights(self, spec: ModelSpec) -> str:
        if spec.backend == "torch":
            return weights_digest(self.source)
        return export_digest(self.source, exported(self.source, spec))
