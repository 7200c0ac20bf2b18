"""Refuses model folders with pickles, with code, or with links and paths to the outside.

The check runs before a library reads the folder, so it does not depend on a library's release. Modules of foreign
classes are refused in parts.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from millstream.worker.models.loading.files import read_json, read_settings, refusal
from millstream.worker.models.loading.parts import LIBRARY, Part

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")

_READERS = ("AutoProcessor", "AutoTokenizer")
"""Keys of auto_map that name classes of tokenizers and processors."""

_ELSEWHERE = {"cache_dir", "code_revision", "gguf_file", "merges_file", "tokenizer_file", "vocab_file"}
"""Arguments of from_pretrained that name files outside of the folder."""

_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")

_ACTIVATIONS = {"activation_fn", "activation_function", "sbert_ce_default_activation_function"}


def refuse_foreign(folder: Path, parts: Iterable[Part], backend: str) -> None:
    """Raises ModelUnavailable if a module's folder has code, a pickle to load, or a link to the outside."""
    for part in parts:
        refuse_links(folder, part.folder)
        # If an exported model runs, transformers loads no weights.
        if not (part.is_transformer and backend != "torch"):
            _refuse_pickles(part.folder)
        kind = _integrated_type(part.folder / "config.json")
        for file in sorted(part.folder.glob("*config.json")):
            content = read_json(file)
            if isinstance(content, dict):
                _refuse_elsewhere(file, content)
            _refuse_code(file, content, kind)


def refuse_links(folder: Path, part: Path) -> None:
    """Raises ModelUnavailable if `part`, or a file in it, is a link to the outside of the model's `folder`."""
    inside = [folder.resolve()]
    # The hub's cache keeps the files of all revisions in `blobs`; `snapshots` has only links to them.
    if folder.parent.name == "snapshots":
        inside.append(folder.parent.parent.resolve() / "blobs")
    for each in (part, *part.iterdir()) if part.is_dir() else ():
        target = each.resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise refusal(each, f"it leads out of the model's folder, to {target}", "put a copy in its place")


def _refuse_pickles(part: Path) -> None:
    """Raises ModelUnavailable if `part` has pickles and no safetensors. Pickles beside safetensors are never read."""
    if any(part.glob("*.safetensors")) or not part.is_dir():
        return
    for file in sorted(each for pattern in _PICKLES for each in part.glob(pattern)):
        raise refusal(
            file,
            "its weights are pickled, which may run code; no model.safetensors is beside it",
            "on a host where you trust it, save the model with save_pretrained(FOLDER), and give that folder",
        )


def _refuse_elsewhere(file: Path, settings: dict[str, object]) -> None:
    own_tokenizer = settings.get("tokenizer_name_or_path")
    if own_tokenizer is not None:
        raise refusal(file, f"it names a tokenizer elsewhere, {own_tokenizer!r}", "save it into the model's folder")
    if isinstance(settings.get("path"), str):
        raise refusal(file, f"it reads weights elsewhere, {settings['path']!r}", "save them into the model's folder")
    for name in _ARGUMENTS:
        arguments = settings.get(name)
        for key in sorted(_ELSEWHERE.intersection(arguments)) if isinstance(arguments, dict) else ():
            raise refusal(file, f"{name}.{key} names another place", "everything must be in the model's folder")


def _refuse_code(file: Path, content: object, kind: str) -> None:
    for key, value in _settings(content):
        if key == "auto_map" and value and not _only_integrated(value, kind):
            raise refusal(
                file,
                f"its auto_map names code of its own: {value}",
                "a model's own code is never run: give a model that transformers has classes for; if transformers' "
                "classes are known to give the same results, delete auto_map from the file",
            )
        if why := _foreign(key, value):
            raise refusal(file, why, "a model's own code is never run: give one that transformers has a class for")


def _settings(value: object) -> Iterator[tuple[str, object]]:
    """Yields all keys and values, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _settings(each)


def _foreign(key: str, value: object) -> str:
    """Returns why a setting is refused; empty if it is accepted."""
    if key == "trust_remote_code" and value:
        return "it asks for trust_remote_code"
    if not isinstance(value, str):
        return ""
    if key.endswith("attn_implementation") and "/" in value:
        return f"{key} names code on the hub, {value!r}"
    if key == "tokenizer_class" and "." in value and not value.startswith(LIBRARY):
        return f"it names the tokenizer {value!r}, which is not one of sentence-transformers'"
    if key in _ACTIVATIONS and "." in value and not _in_torch(value):
        return f"{key} names {value!r}, which is not one of torch.nn's"
    return ""


def _integrated_type(config: Path) -> str:
    """Returns the model type in config.json if its author's classes became part of transformers; empty if not.

    Authors keep auto_map in the settings for older releases of transformers; then auto_map names their AutoConfig. If
    it names none, the type was always part of transformers, so the code has another purpose: its classes may have the
    names of transformers' classes, and compute something else.
    """
    settings = read_settings(config)
    kind, auto_map = settings.get("model_type"), settings.get("auto_map")
    if not isinstance(kind, str) or not isinstance(auto_map, dict) or kind not in CONFIG_MAPPING:
        return ""
    return kind if _names(auto_map, "AutoConfig") == [CONFIG_MAPPING[kind].__name__] else ""


def _only_integrated(auto_map: object, kind: str) -> bool:
    """Returns whether `auto_map` names classes of the integrated type `kind`. Only a head may have another name."""
    if not kind or not isinstance(auto_map, dict):
        return False
    models = MODEL_MAPPING_NAMES.get(kind, ())
    return (
        set(_names(auto_map, "AutoConfig")) <= {CONFIG_MAPPING[kind].__name__}
        and set(_names(auto_map, "AutoModel")) <= {*([models] if isinstance(models, str) else models)}
        and all(hasattr(transformers, name) for key in _READERS for name in _names(auto_map, key))
    )


def _names(auto_map: dict[str, object], key: str) -> list[str]:
    """Returns the names of the classes that `auto_map` has for `key`, without their modules."""
    value = auto_map.get(key)
    names = value if isinstance(value, list) else [value]
    return [str(name).rpartition(".")[2] for name in names if name is not None]


def _in_torch(name: str) -> bool:
    kind = getattr(nn, name.rpartition(".")[2], None)
    return name.startswith("torch.nn.") and isinstance(kind, type) and issubclass(kind, nn.Module)
