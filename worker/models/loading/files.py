"""Reads and checks files of a model's folder. Each error names the file."""

from __future__ import annotations

import json
from pathlib import Path

from millstream.broker.contract.errors import ModelUnavailable

_POINTER = b"version https://git-lfs.github.com/spec/"


def refusal(file: Path, why: str, hint: str) -> ModelUnavailable:
    """Returns the error of a model folder that is refused because of `file`."""
    return ModelUnavailable(f"{file}: {why}", hint=hint)


def missing_file(file: Path, why: str = "it is missing") -> ModelUnavailable:
    """Returns the error of a model folder in which `file` is missing or incomplete."""
    return refusal(file, why, "copy or download the folder again, whole")


def check_content(file: Path) -> None:
    """Raises ModelUnavailable if `file` is empty, cannot be read, or is a git-lfs pointer."""
    try:
        with file.open("rb") as handle:
            head = handle.read(len(_POINTER))
    except OSError as error:
        raise refusal(file, error.strerror or str(error), "let the worker's user read it") from None
    if not head:
        raise missing_file(file, "it is empty")
    if head == _POINTER:
        raise refusal(file, "it is a git-lfs pointer, not the file itself", "run `git lfs pull` in the folder")


def read_json(file: Path) -> object:
    """Returns the content of a JSON file. Raises ModelUnavailable."""
    check_content(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise missing_file(file, f"it is no JSON, or was cut off: {error}") from None


def read_settings(file: Path) -> dict[str, object]:
    """Returns the content of a file that holds a JSON object; empty if there is no file. Raises ModelUnavailable."""
    if not file.is_file():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise refusal(file, "it is no JSON object", "copy or download the folder again, whole")
    return content


def below(folder: Path, path: object, source: Path) -> Path:
    """Returns `path`, which the file `source` names, inside `folder`. Raises ModelUnavailable if it is outside."""
    place = Path(path) if isinstance(path, str) and "\\" not in path else None
    if place is None or place.is_absolute() or ".." in place.parts:
        raise refusal(source, f"it names the path {path!r}, outside of the folder", "nothing outside of it is read")
    return folder / place
