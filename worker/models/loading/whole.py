"""Refuses a model folder that lacks a file, or has half of one.

The libraries pass over much of that: without its vocabulary a tokenizer reads every word as unknown, without
modules.json the pooling is guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from millstream.worker.models.loading.files import below, check_content, missing, read_json, read_settings, refused
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
"""Names of the tensor of modules whose loading names none when it is missing. The second one is model2vec's."""

_LIMITS = ("sentence_bert_config.json", "sentence_*_config.json")
"""Settings of a transformer: in the first layout no more than the limit of a text."""

_JSON = ("*config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", _INDEX)
_TEXT = ("vocab.txt", "merges.txt", "*.jinja", "*.model", "*.spm")

_VOCABULARIES = ("vocab.txt", "vocab.json", "*.model", "*.spm", "*.codes", "vocab.bpe", "*.tiktoken", "tekken.json")
"""Files from one of which a tokenizer is made if there is no tokenizer.json."""

_READS_ONE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizers that are made from tokenizer.json alone, whatever is beside it."""

_BYTES = ("byt5", "canine", "perceiver")
"""Architectures whose tokenizers read bytes or characters, and have no vocabulary."""


def check_whole(folder: Path, parts: Sequence[Part], backend: str) -> None:
    """Raise ModelUnavailable, with its name, if a file is missing, empty, cut off, or a pointer of git-lfs."""
    _check_listing(folder)
    by_library = isinstance(read_settings(folder / SETTINGS).get("__version__"), dict)
    for part in parts:
        _check_content(part.folder)
        if part.saved and not (folder / SETTINGS).is_file():
            raise missing(folder / SETTINGS)
        if part.is_transformer:
            _check_transformer(part, by_library)
        else:
            _check_other(part)
    for part in weighed(parts, backend):
        _check_weights(part)


def weighed(parts: Iterable[Part], backend: str) -> Iterator[Part]:
    """The modules whose weights are read from safetensors."""
    return (part for part in parts if part.kind.__name__ in _WEIGHED or (part.is_transformer and backend == "torch"))


def has_weights(part: Part) -> bool:
    """Whether the module's folder has a safetensors file, or an index of several."""
    return any((part.folder / name).is_file() for name in (_WEIGHTS, _INDEX))


def _check_other(part: Part) -> None:
    name = part.kind.__name__
    # Normalize wrote none in its first years, and git keeps no empty folders.
    if getattr(part.kind, "config_keys", ()) and name != "Normalize":
        _check_there(part.folder, str(getattr(part.kind, "config_file_name", "config.json")))
    if name == "SparseStaticEmbedding":
        _check_tokenizer(part.folder, part.saved)
    if name == "StaticEmbedding":
        _check_there(part.folder, "tokenizer.json")


def _check_listing(folder: Path) -> None:
    """Without modules.json the pooling would be guessed, and settings beside it be passed over."""
    if (folder / "modules.json").is_file():
        return
    for trace in (*folder.glob(SETTINGS), *folder.glob("sentence_*_config.json"), *folder.glob("[0-9]_[A-Z]*")):
        raise missing(folder / "modules.json", f"it is missing, but {trace.name} is there")


def _check_there(folder: Path, *names: str) -> None:
    if not any(True for name in names for _ in folder.glob(name)):
        raise missing(folder / names[0])


def _check_content(folder: Path) -> None:
    for file in _files(folder, _JSON):
        read_json(file)
    for file in _files(folder, _TEXT):
        check_content(file)


def _files(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    return (file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file())


def _check_transformer(part: Part, by_library: bool) -> None:
    """`by_library` says that sentence-transformers wrote the settings, and most likely the other files."""
    folder = part.folder
    _check_there(folder, "config.json")
    if (folder / "adapter_config.json").exists():
        raise refused(
            folder / "adapter_config.json",
            "it is an adapter to another model, which may be another one on each host",
            "merge the two (merge_and_unload), save the result, and give that folder",
        )
    if part.saved:
        _check_there(folder, *_LIMITS)
    # CLIP had none in the first layout. Other folders of that time may be put together by hand.
    elif by_library and part.kind.__name__ != "CLIPModel" and not any(_files(folder, _LIMITS)):
        log.warning("%s is missing: texts are cut at the transformer's own limit", folder / _LIMITS[0])
    _check_tokenizer(folder, part.saved or by_library)


def _check_tokenizer(folder: Path, saved: bool) -> None:
    kind = read_settings(folder / "config.json").get("model_type")
    reader = read_settings(folder / "tokenizer_config.json").get("tokenizer_class")
    has_file = (folder / "tokenizer.json").is_file()
    if not has_file and kind not in _BYTES:
        _check_there(folder, "tokenizer.json", *(() if reader in _READS_ONE_FILE else _VOCABULARIES))
        if (folder / "vocab.json").is_file() and not any(_files(folder, ("merges.txt", "*.model"))):
            raise missing(folder / "merges.txt", "neither it nor tokenizer.json is there")
    # Both are written together; a vocabulary alone is how the first models were published.
    if has_file or saved:
        _check_there(folder, "tokenizer_config.json")
    if _chats(folder) and not _has_template(folder):
        raise missing(folder / "chat_template.jinja")


def _chats(folder: Path) -> bool:
    """Whether the model was saved as one that puts its texts into a chat template."""
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
        raise missing(index, "it names no files")
    for file in sorted({below(folder, name, index) for name in shards.values()}):
        if not file.is_file():
            raise missing(file, f"it is missing, and {_INDEX} names it")
        _check_safetensors(file)


def _check_safetensors(file: Path, one_of: Sequence[str] = ()) -> None:
    check_content(file)
    try:
        # Reads the header, and compares the file's length with it.
        with safe_open(file, framework="np") as opened:
            names = set(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise missing(file, f"it is no whole safetensors file: {error}") from None
    if one_of and not names.intersection(one_of):
        raise missing(file, f"it lacks the tensor {one_of[0]}")
