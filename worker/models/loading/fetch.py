"""Finds a model's folder on this host, or downloads it from the hub, and checks it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models.loading.exports import needs_folder
from millstream.worker.models.loading.foreign import refuse_foreign
from millstream.worker.models.loading.parts import Part, parts_of
from millstream.worker.models.loading.source import locate
from millstream.worker.models.loading.whole import check_whole, has_weights, parts_with_weights

_READ = (
    *("*.json", "*.txt", "*.jinja", "*.model", "*.spm", "*.codes", "*.bpe", "*.tiktoken"),
    *("model*.safetensors", "*/model*.safetensors"),
)
"""Patterns of files that are downloaded from the hub: no code, no pickles, and no formats that are not read."""


def fetch_folder(spec: ModelSpec, organization: str = "") -> Path:
    """Returns the checked folder of the model of `spec`.

    A hub name without a slash belongs to `organization`, if one is given. Raises ModelUnavailable if there is no
    folder, if it is incomplete, if it contains code, or if it refers to files outside. This happens before a library
    reads the folder.
    """
    named = source = locate(spec.model_name, organization)
    if not isinstance(source, Path):
        if spec.backend != "torch":
            raise needs_folder(source, spec)
        source = _download(source, spec)
    parts = parts_of(source)
    if not isinstance(named, Path):
        _check_published(named, source, parts)
    refuse_foreign(source, parts, spec.backend)
    check_whole(source, parts, spec.backend)
    return source


def _download(name: str, spec: ModelSpec) -> Path:
    """Returns the folder in the hub's cache, and downloads it if it is not there yet. Raises ModelUnavailable."""
    reason: Exception | None = None
    for candidate in _hub_ids(name):
        try:
            folder = snapshot_download(
                candidate, revision=spec.revision, cache_dir=cache_dir(), allow_patterns=list(_READ)
            )
            return Path(folder)
        except (OSError, ValueError) as error:
            reason = error
    raise ModelUnavailable(
        f"cannot download {name!r}: {str(reason).strip().splitlines()[0]}", hint="check model_name and revision"
    ) from reason


def _check_published(name: str, folder: Path, parts: Sequence[Part]) -> None:
    """Raises ModelUnavailable if the hub has no safetensors of the model: many older models are only pickles."""
    for part in parts_with_weights(parts, "torch"):
        if not has_weights(part):
            file = part.folder.relative_to(folder) / "model.safetensors"
            raise ModelUnavailable(
                f"{name!r} has no {file} on the hub, and weights in other formats, such as pickles, are not read",
                hint="set revision: refs/pr/N to the pull request of the model's page that adds safetensors, if there "
                "is one; or load the model elsewhere, where you trust it, save it with save_pretrained(FOLDER), and "
                "give that folder",
            )


def cache_dir() -> str | None:
    """Returns the folder of sentence-transformers' downloads; None for the hub's own cache."""
    return os.environ.get("SENTENCE_TRANSFORMERS_HOME")


def _hub_ids(name: str) -> list[str]:
    """Returns the hub ids to try for `name`: without a slash, first as a model of sentence-transformers."""
    return [name] if "/" in name else [f"sentence-transformers/{name}", name]
