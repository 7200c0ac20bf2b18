"""A model as a folder on this host that was looked over: from where it is, or downloaded from the hub."""

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
from millstream.worker.models.loading.whole import check_whole, has_weights, weighed

_READ = (
    *("*.json", "*.txt", "*.jinja", "*.model", "*.spm", "*.codes", "*.bpe", "*.tiktoken"),
    *("model*.safetensors", "*/model*.safetensors"),
)
"""Files of the hub that are read: no code, no pickles, none of the other formats that are often beside them."""


def local(spec: ModelSpec, organization: str = "") -> Path:
    """The folder of the model of `spec`. Raises ModelUnavailable if there is none, if it is not whole, or if it brings
    code or leads out; then no library has seen it.

    A name of the hub without a slash is `organization`'s, if one is given.
    """
    named = source = locate(spec.model_name, organization)
    if not isinstance(source, Path):
        if spec.backend != "torch":
            raise needs_folder(source, spec)
        source = _downloaded(source, spec)
    parts = parts_of(source)
    if not isinstance(named, Path):
        _check_published(named, source, parts)
    refuse_foreign(source, parts, spec.backend)
    check_whole(source, parts, spec.backend)
    return source


def _downloaded(name: str, spec: ModelSpec) -> Path:
    """The folder in the hub's cache, downloaded if it is not there yet. Raises ModelUnavailable."""
    reason: Exception | None = None
    for candidate in _names(name):
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
    """Raise ModelUnavailable if the hub has no weights that are read: many older models are pickles alone."""
    for part in weighed(parts, "torch"):
        if not has_weights(part):
            file = part.folder.relative_to(folder) / "model.safetensors"
            raise ModelUnavailable(
                f"{name!r} has no {file} on the hub, and weights in other formats, pickles among them, are not read",
                hint="set revision: refs/pr/N to the pull request of the model's page that adds safetensors, if there "
                "is one; or load the model elsewhere, where you trust it, save it with save_pretrained(FOLDER), and "
                "give that folder",
            )


def cache_dir() -> str | None:
    """The folder in which sentence-transformers keeps its downloads; None is the hub's own cache."""
    return os.environ.get("SENTENCE_TRANSFORMERS_HOME")


def _names(name: str) -> list[str]:
    """A hub id as it stands, a short one first as one of sentence-transformers' own."""
    return [name] if "/" in name else [f"sentence-transformers/{name}", name]
