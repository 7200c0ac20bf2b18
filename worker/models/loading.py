"""Loading, for all kinds of models: safetensors only, no code that a model brings; what a folder says of itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer, SparseEncoder
from transformers.utils.hub import cached_file

from millstream.broker.config import ModelSpec
from millstream.broker.errors import ModelUnavailable
from millstream.worker.models.exports import check_runs, export_digest, exported, find
from millstream.worker.models.linear import prepack
from millstream.worker.models.source import settings_digest, weights_digest

# A worker logs one line when it is ready; bars of many processes only garble a terminal.
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

Loaded = SentenceTransformer | SparseEncoder
M = TypeVar("M", bound=torch.nn.Module)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}

_KINDS: Mapping[str, type[Loaded]] = {"SentenceTransformer": SentenceTransformer, "SparseEncoder": SparseEncoder}

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
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
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


def cache_dir() -> str | None:
    """Where sentence-transformers keeps what it downloads; None is the hub's own cache."""
    return os.environ.get("SENTENCE_TRANSFORMERS_HOME")


def load(source: Path | str, spec: ModelSpec, device: str | None) -> Loaded:
    """The embedding model, dense or sparse, in a folder or of the hub's name. Raises ModelUnavailable."""
    try:
        kind = _kind(source, spec.revision)
    except LOAD_ERRORS as error:
        raise unavailable(error, spec, device) from error
    return loaded(kind, source, spec, device)


def loaded(kind: type[M], source: Path | str, spec: ModelSpec, device: str | None) -> M:
    """The same, known to be of `kind`: any that sentence-transformers has."""
    where, kwargs = device, model_kwargs(spec)
    if spec.backend != "torch":
        where, kwargs = find(source, spec, device, kind.__name__)
    make: Callable[..., M] = kind
    try:
        model = make(
            str(source),
            device=None if where in (None, "auto") else where,
            revision=spec.revision,
            trust_remote_code=False,
            backend=spec.backend,
            model_kwargs=kwargs,
        )
    except Exception as error:
        # ONNX Runtime and OpenVINO have errors of no common type.
        if spec.backend == "torch" and not isinstance(error, LOAD_ERRORS):
            raise
        raise unavailable(error, spec, device) from error
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


def _kind(source: Path | str, revision: str | None) -> type[Loaded]:
    """What the model's own settings say it is; dense where they say nothing."""
    name = "SentenceTransformer"
    # Without the hub they may be nowhere: then loading says what is the matter.
    with suppress(OSError):
        name = Folder(source, revision).settings().get("model_type", name)
    if name not in _KINDS:
        raise ModelUnavailable(f"{str(source)!r} is a {name}, no embedding model", hint=f"one of {', '.join(_KINDS)}")
    return _KINDS[name]


def snapshot(name: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache that `name` was loaded from; None where there is none to be found."""
    for candidate in _names(name):
        for file in ("modules.json", "config.json"):
            with suppress(OSError):
                found = cached_file(candidate, file, revision=revision, cache_dir=cache_dir(), local_files_only=True)
                if found:
                    return Path(found).parent
    return None


def _names(name: str) -> list[str]:
    """A hub id as it stands, a short one first as one of sentence-transformers' own."""
    return [name] if "/" in name else [f"sentence-transformers/{name}", name]


class Folder(NamedTuple):
    """Where a model is, a folder or a hub id, and what it says of itself there."""

    source: Path | str
    revision: str | None = None

    def read(self, file: str) -> Any:
        """The JSON of `file`; None where the model has no such file. Raises one of LOAD_ERRORS."""
        path = self._path(file)
        return None if path is None else json.loads(path.read_text(encoding="utf-8"))

    def settings(self) -> dict[str, Any]:
        """What sentence-transformers wrote beside the weights; empty for other models."""
        return self.read("config_sentence_transformers.json") or {}

    def prompt(self) -> str:
        """What goes before a query by default; for a model that chats, the system's message."""
        settings = self.settings()
        return (settings.get("prompts") or {}).get(settings.get("default_prompt_name")) or ""

    def chat_settings(self) -> dict[str, Any]:
        """The arguments of the chat template."""
        kwargs = (self.read("sentence_bert_config.json") or {}).get("processing_kwargs") or {}
        return kwargs.get("chat_template") or {}

    def fingerprint(self, spec: ModelSpec, dtype: torch.dtype | None, *what: str) -> str:
        """Names the weights, by 16 hex digits, what else counts, by 8, the revision asked for, and how it all runs."""
        folder = self.source if isinstance(self.source, Path) else snapshot(self.source, self.revision)
        digest = f"{self._weights(spec, folder)[:16]}+{settings_digest(folder)[:8]}" if folder else str(self.source)
        revision = f"@{self.revision}" if self.revision else ""
        runs = str(dtype).removeprefix("torch.") if spec.backend == "torch" else spec.backend
        return " ".join([digest + revision, runs, *what])

    def _weights(self, spec: ModelSpec, folder: Path) -> str:
        if spec.backend == "torch":
            return weights_digest(folder)
        return export_digest(folder, exported(folder, spec))

    def _path(self, file: str) -> Path | None:
        if isinstance(self.source, Path):
            path = self.source / file
            return path if path.is_file() else None
        missing: OSError | None = None
        for candidate in _names(self.source):
            try:
                found = cached_file(
                    candidate,
                    file,
                    revision=self.revision,
                    cache_dir=cache_dir(),
                    _raise_exceptions_for_missing_entries=False,
                )
            except OSError as error:
                missing = error
                continue
            return Path(found) if found else None
        raise missing or OSError(f"no model {self.source!r}")
