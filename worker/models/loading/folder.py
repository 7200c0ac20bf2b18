"""A model's folder: the settings that its files hold, and the fingerprint of what it answers with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from millstream.broker.config.load import ModelSpec
from millstream.worker.models.loading.exports import export_digest, export_file
from millstream.worker.models.loading.files import refusal
from millstream.worker.models.loading.source import settings_digest, weights_digest
from millstream.worker.models.loading.whole import SETTINGS


class Folder(NamedTuple):
    """A model's folder. `revision` is the configured revision on the hub."""

    source: Path
    revision: str | None = None

    def read(self, file: str) -> Any:
        """Returns the JSON of `file`; None if there is no such file. Raises OSError or ValueError."""
        path = self.source / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that sentence-transformers wrote; empty if another library saved the model."""
        return self.read(SETTINGS) or {}

    def prompt(self) -> str:
        """Returns the default text before a query; for a chat template it is the system's message."""
        settings = self.settings()
        name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
        if name and name not in prompts:
            raise refusal(
                self.source / SETTINGS, f"it has no prompt {name!r}, its default one", "add it, or name another"
            )
        return prompts.get(name) or ""

    def chat_settings(self) -> dict[str, Any]:
        """Returns the arguments of the chat template."""
        kwargs = (self.read("sentence_bert_config.json") or {}).get("processing_kwargs") or {}
        return kwargs.get("chat_template") or {}

    def fingerprint(self, spec: ModelSpec, dtype: torch.dtype | None, *what: str) -> str:
        """Returns 16 hex digits for the weights, 8 for the settings, the revision, the dtype or backend, and `what`."""
        digest = f"{self._weights(spec)[:16]}+{settings_digest(self.source)[:8]}"
        revision = f"@{self.revision}" if self.revision else ""
        runs = str(dtype).removeprefix("torch.") if spec.backend == "torch" else spec.backend
        return " ".join(filter(None, [digest + revision, runs, *what]))

    def digest(self, file: str) -> str:
        """Returns 8 hex digits for the contents of `file`; "" if there is no such file."""
        path = self.source / file
        return hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path.is_file() else ""

    def _weights(self, spec: ModelSpec) -> str:
        if spec.backend == "torch":
            return weights_digest(self.source)
        return export_digest(self.source, export_file(self.source, spec))
