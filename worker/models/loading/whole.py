"""Refuses a model folder in which a file is missing or incomplete.

The libraries do not report many of these faults: without its vocabulary a tokenizer reads every word as unknown, and
without modules.json the pooling is guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from millstream.worker.models.loading.files import below, check_content, missing_file, read_json, read_settings, refusal
from millstream.worker.models.loading.parts import Part

log = logging.getLogger(__name__)

SETTINGS = "config_sentence_transformers.json"

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

_WEIGHED = {
    *("CNN", "Dense", "LSTM", "LayerNorm", "SparseAutoEncoder", "SparseStaticEmbedding", "StaticEmbedding"),
    *("WeightedLayerPooling", "WordEmbeddings"),
}
"""Modules of sentence-transformers with weights of their own."""

_TENSORS = {"StaticEmbedding": ("embedding.weight", "embeddings"), "WordEmbeddings": ("emb_layer.weight",)}
"""Tensor names of modules whose loading error would not name a missing tensor. "embeddings" is model2vec's name."""

_LIMITS = ("sentence_bert_config.json", "sentence_*_config.json")
"""Settings of a transformer. In folders of releases before 5.4 they only hold the limit of a text."""

_JSON = ("*config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", _INDEX)
_TEXT = ("vocab.txt", "merges.txt", "*.jinja", "*.model", "*.spm")

_VOCABULARIES = ("vocab.txt", "vocab.json", "*.model", "*.spm", "*.codes", "vocab.bpe", "*.tiktoken", "tekken.json")
"""Vocabulary files: if there is no tokenizer.json, the tokenizer is made from one of them."""

_READS_ONE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that read only tokenizer.json."""

_BYTES = ("byt5", "canine", "perceiver")
"""Model types whose tokenizers read bytes or characters, so they have no vocabulary."""


def check_whole(folder: Path, parts: Sequence[Part], backend: str) -> None:
    """Raises ModelUnavailable, with the file's name, if one is missing, empty, cut off, or a git-lfs pointer."""
    _check_listing(folder)
    by_library = isinstance(read_settings(folder / SETTINGS).get("__version__"), dict)
    for part in parts:
        _check_content(part.folder)
        if part.current_layout and not (folder / SETTINGS).is_file():
            raise missing_file(folder / SETTINGS)
        if part.is_transformer:
            _check_transformer(part, by_library)
        else:
            _check_other(part)
    for part in parts_with_weights(parts, backend):
        _check_weights(part)


def parts_with_weights(parts: Iterable[Part], backend: str) -> Iterator[Part]:
    """Returns the modules whose weights are read from safetensors."""
    return (part for part in parts if part.kind.__name__ in _WEIGHED or (part.is_transformer and backend == "torch"))


def has_weights(part: Part) -> bool:
    """Returns whether the module's folder has a safetensors file, or an index of several."""
    return any((part.folder / name).is_file() for name in (_WEIGHTS, _INDEX))


def _check_other(part: Part) -> None:
    name = part.kind.__name__
    # Older releases wrote no settings for Normalize, so its folder may be missing: git stores no empty folders.
    if getattr(part.kind, "config_keys", ()) and name != "Normalize":
        _check_there(part.folder, str(getattr(part.kind, "config_file_name", "config.json")))
    if name == "SparseStaticEmbedding":
        _check_tokenizer(part.folder, part.current_layout)
    if name == "StaticEmbedding":
        _check_there(part.folder, "tokenizer.json")


def _check_listing(folder: Path) -> None:
    """Raises ModelUnavailable if modules.json is missing: the library would guess the pooling and ignore settings."""
    if (folder / "modules.json").is_file():
        return
    for trace in (*folder.glob(SETTINGS), *folder.glob("sentence_*_config.json"), *folder.glob("[0-9]_[A-Z]*")):
        raise missing_file(folder / "modules.json", f"it is missing, but {trace.name} is there")


def _check_there(folder: Path, *names: str) -> None:
    if not any(True for name in names for _ in folder.glob(name)):
        raise missing_file(folder / names[0])


def _check_content(folder: Path) -> None:
    for file in _files(folder, _JSON):
        read_json(file)
    for file in _files(folder, _TEXT):
        check_content(file)


def _files(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    return (file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file())


def _check_transformer(part: Part, by_library: bool) -> None:
    """Raises ModelUnavailable if a file is missing.

    `by_library` is true if sentence-transformers wrote the settings, so most likely the other files too.
    """
    folder = part.folder
    _check_there(folder, "config.json")
    if (folder / "adapter_config.json").exists():
        raise refusal(
            folder / "adapter_config.json",
            "it is an adapter to a base model, which may differ between hosts",
            "merge it into the base model (merge_and_unload), save the result, and give that folder",
        )
    if part.current_layout:
        _check_there(folder, *_LIMITS)
    # Before release 5.4 CLIP had no such file, and other folders may have been written by hand.
    elif by_library and part.kind.__name__ != "CLIPModel" and not any(_files(folder, _LIMITS)):
        log.warning("%s is missing: the limit of texts is the transformer's own", folder / _LIMITS[0])
    _check_tokenizer(folder, part.current_layout or by_library)


def _check_tokenizer(folder: Path, current_layout: bool) -> None:
    kind = read_settings(folder / "config.json").get("model_type")
    reader = read_settings(folder / "tokenizer_config.json").get("tokenizer_class")
    has_file = (folder / "tokenizer.json").is_file()
    if not has_file and kind not in _BYTES:
        _check_there(folder, "tokenizer.json", *(() if reader in _READS_ONE_FILE else _VOCABULARIES))
        if (folder / "vocab.json").is_file() and not any(_files(folder, ("merges.txt", "*.model"))):
            raise missing_file(folder / "merges.txt", "neither it nor tokenizer.json is there")
    # Libraries write both files together; the first published models have a vocabulary only.
    if has_file or current_layout:
        _check_there(folder, "tokenizer_config.json")
    if _chats(folder) and not _has_template(folder):
        raise missing_file(folder / "chat_template.jinja")


def _chats(folder: Path) -> bool:
    """Returns whether the saved model puts its texts into a chat template."""
    modalities = read_settings(folder / "sentence_bert_config.json").get("modality_config")
    return isinstance(modalities, dict) and "message" in modalities


def _has_template(folder: Path) -> bool:
    files = (folder / name for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates"))
    return any(file.exists() for file in files) or bool(
        read_settings(folder / "tokenizer_config.json").get("chat_template")
    )


def _check_weights(part: Part) -> None:
    folder = part.folder
    index = folder / _INDEX
    if (folder / _WEIGHTS).is_file() or not index.is_file():
        _check_there(folder, _WEIGHTS)
        _check_safetensors(folder / _WEIGHTS, _TENSORS.get(part.kind.__name__, ()))
        return
    shards: Any = read_settings(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise missing_file(index, "it names no files")
    for file in sorted({below(folder, name, index) for name in shards.values()}):
        if not file.is_file():
            raise missing_file(file, f"it is missing, and {_INDEX} names it")
        _check_safetensors(file)


def _check_safetensors(file: Path, one_of: Sequence[str] = ()) -> None:
    check_content(file)
    try:
        # safe_open reads the header and compares the file's length with it.
        with safe_open(file, framework="np") as opened:
            names = set(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise missing_file(file, f"it is no whole safetensors file: {error}") from None
    if one_of and not names.intersection(one_of):
        raise missing_file(file, f"it lacks the tensor {one_of[0]}")
