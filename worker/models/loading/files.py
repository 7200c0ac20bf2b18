"""Reads the files of a model's folder with distrust; each error names the file."""

from __future__ import annotations

import json
from pathlib import Path

from millstream.broker.contract.errors import ModelUnavailable

_POINTER = b"version https://git-lfs.github.com/spec/"


def refused(file: Path, why: str, hint: str) -> ModelUnavailable:
    """The error of a model folder that cannot be served because of `file`."""
    return ModelUnavailable(f"{file}: {why}", hint=hint)


def missing(file: Path, why: str = "it is missing") -> ModelUnavailable:
    """The error of a model folder without `file`."""
    return refused(file, why, "copy or download the folder again, whole")


def check_content(file: Path) -> None:
    """Raise ModelUnavailable if `file` is empty, cannot be read, or only points to a content that git-lfs keeps."""
    try:
        with file.open("rb") as handle:
            head = handle.read(len(_POINTER))
    except OSError as error:
        raise refused(file, error.strerror or str(error), "let the worker's user read it") from None
    if not head:
        raise missing(file, "it is empty")
    if head == _POINTER:
        raise refused(file, "it is a git-lfs pointer, not the file itself", "run `git lfs pull` in the folder")


def read_json(file: Path) -> object:
    """The content of a JSON file. Raises ModelUnavailable."""
    check_content(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise missing(file, f"it is no JSON, or was cut off: {error}") from None


def read_settings(file: Path) -> dict[str, object]:
    """The content of a file that holds a JSON object; empty if there is none."""
    if not file.is_file():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise refused(file, "it is no JSON object", "copy or download the folder again, whole")
    return content


def below(folder: Path, path: object, source: Path) -> Path:
    """The place in `folder` of a path that the file `source` names. Raises ModelUnavailable if it leads out of it."""
    place = Path(path) if isinstance(path, str) and "\\" not in path else None
    if place is None or place.is_absolute() or ".." in place.parts:
        raise refused(source, f"it names the path {path!r}, outside of the folder", "nothing outside of it is read")
    return folder / place
