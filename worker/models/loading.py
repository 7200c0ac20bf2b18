"""What loading has in common for all kinds of models: the hub's cache, what a folder says of itself, what fails."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from millstream.broker.config import ModelSpec
from millstream.broker.errors import ModelUnavailable
from millstream.worker.models.source import weights_digest

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}

LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, SafetensorError)
"""What the model libraries raise where there is nothing they can load."""


def unavailable(error: Exception, spec: ModelSpec, device: str | None) -> ModelUnavailable:
    """The error of a model that could not be loaded, for one of LOAD_ERRORS."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelUnavailable(
        f"cannot load {spec.model_name!r} on {device or 'auto'}: {reason}",
        hint="check model_name, revision and device",
    )


def longest(tokenizer: Any, config: Any) -> int:
    """The most tokens a model reads."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or -1
    most = int(tokenizer.model_max_length)
    return min(most, positions) if positions > 0 else most


def cache_dir() -> str | None:
    """Where sentence-transformers keeps what it downloads; None is the hub's own cache."""
    return os.environ.get("SENTENCE_TRANSFORMERS_HOME")


def snapshot(name: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache that `name` was loaded from; None where there is none to be found."""
    repository = name if "/" in name else f"sentence-transformers/{name}"
    for candidate in dict.fromkeys((repository, name)):
        for file in ("modules.json", "config.json"):
            with suppress(OSError):
                found = cached_file(candidate, file, revision=revision, cache_dir=cache_dir(), local_files_only=True)
                if found:
                    return Path(found).parent
    return None


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

    def weights(self) -> str:
        """16 hex digits of the weights' digest, with the revision where one was asked for."""
        folder = self.source if isinstance(self.source, Path) else snapshot(self.source, self.revision)
        digest = weights_digest(folder)[:16] if folder else str(self.source)
        return f"{digest}@{self.revision}" if self.revision else digest

    def _path(self, file: str) -> Path | None:
        if isinstance(self.source, Path):
            path = self.source / file
            return path if path.is_file() else None
        found = cached_file(
            self.source,
            file,
            revision=self.revision,
            cache_dir=cache_dir(),
            _raise_exceptions_for_missing_entries=False,
        )
        return Path(found) if found else None
