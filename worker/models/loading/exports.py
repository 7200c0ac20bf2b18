"""Models exported to ONNX or OpenVINO: which file runs and where, how it is loaded, and what names it.

The export is made beforehand, by sentence-transformers: a worker that exports as it starts would do so at each start.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models.loading.files import check_content
from millstream.worker.models.loading.foreign import refuse_links
from millstream.worker.models.loading.source import module_folders

_FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
_LIBRARIES = {"onnx": ("onnxruntime", "optimum.onnxruntime"), "openvino": ("optimum.intel.openvino",)}


class Export(NamedTuple):
    """An exported model: the device for it and the modules behind it, and its loading."""

    device: str
    kwargs: dict[str, Any]
    """How the file is to be loaded, as from_pretrained takes it."""


def needs_folder(source: str, spec: ModelSpec) -> ModelUnavailable:
    """The error of an exported model that is on the hub."""
    return ModelUnavailable(
        f"backend {spec.backend} runs a model from a folder, {spec.model_name!r} is on the hub",
        hint=f"download it (hf download {source} --local-dir FOLDER) and give the folder",
    )


def find(source: Path, spec: ModelSpec, device: str | None, kind: str) -> Export:
    """The export of a model of `kind`, a class of sentence-transformers. Raises ModelUnavailable."""
    file = exported(source, spec, kind)
    refuse_links(source, (source / file).parent)
    for part in _parts(source / file):
        check_content(part)
    _check_installed(spec.backend)
    where = _onnx_device(device) if spec.backend == "onnx" else _openvino_device(device)
    options = _onnx(where) if spec.backend == "onnx" else _openvino()
    return Export(where, {"file_name": file, "export": False, **options})


def exported(folder: Path, spec: ModelSpec, kind: str = "SentenceTransformer") -> str:
    """The file to run, below the model's folder. Raises ModelUnavailable."""
    default = _FILES[spec.backend]
    names = [spec.model_file] if spec.model_file else [default, f"{spec.backend}/{default}"]
    for name in names:
        if (folder / name).is_file():
            return name
    raise ModelUnavailable(
        f"{spec.model_name!r} has no {' or '.join(names)}, which backend {spec.backend} runs",
        hint=f'export it with {kind}(NAME, backend="{spec.backend}").save_pretrained(FOLDER), or name another '
        "model_file",
    )


def _check_installed(backend: str) -> None:
    try:
        for library in _LIBRARIES[backend]:
            importlib.import_module(library)
    except ImportError as error:
        raise ModelUnavailable(
            f"backend {backend}: {error}", hint=f"pip install 'sentence-transformers[{backend}]'"
        ) from error


def _onnx_device(device: str | None) -> str:
    has_cuda = "CUDAExecutionProvider" in importlib.import_module("onnxruntime").get_available_providers()
    if device in (None, "auto"):
        return "cuda" if has_cuda and torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ModelUnavailable(f"backend onnx on {device}: it runs on cpu and cuda", hint="set device")
    if kind == "cuda" and not has_cuda:
        raise ModelUnavailable(
            f"backend onnx on {device}: the ONNX Runtime installed here is for the CPU",
            hint="pip install 'sentence-transformers[onnx-gpu]'",
        )
    return device


def _onnx(device: str) -> dict[str, Any]:
    options = importlib.import_module("onnxruntime").SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return {"provider": "CPUExecutionProvider", "session_options": options}
    cuda = {"provider": "CUDAExecutionProvider", "provider_options": {"device_id": int(number or 0)}}
    return {**cuda, "session_options": options}


def _openvino_device(device: str | None) -> str:
    if device not in (None, "auto", "cpu"):
        raise ModelUnavailable(f"backend openvino on {device}: it runs on the CPU here", hint="set device: cpu")
    return "cpu"


def _openvino() -> dict[str, Any]:
    # By default it computes in bfloat16 wherever the CPU can, whatever the file holds.
    config = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads()), "INFERENCE_PRECISION_HINT": "f32"}
    return {"device": "cpu", "ov_config": config}


def check_runs(model: torch.nn.Module, spec: ModelSpec) -> None:
    """Raises ModelUnavailable where sentence-transformers passed the backend over and took weights for torch."""
    first = next(model.children(), model)
    if isinstance(getattr(first, "model", first), torch.nn.Module):
        raise ModelUnavailable(
            f"backend {spec.backend} does not run {spec.model_name!r}, whose first module is a {type(first).__name__}",
            hint="leave backend out",
        )


def export_digest(folder: Path, file: str) -> str:
    """SHA-256, in hex, over what runs of the model in `folder`: the exported file, the weights it keeps beside itself
    where they are too large for one, under whatever names, and those of the modules behind it, which torch runs.
    """
    digest = hashlib.sha256()
    for each in (*sorted(_parts(folder / file)), *_behind(folder)):
        with each.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


_NO_PARTS = {".json", ".jinja", ".md", ".model", ".onnx", ".safetensors", ".txt", ".xml", ".yaml"}


def _parts(export: Path) -> Iterator[Path]:
    yield export
    if export.suffix == ".xml":
        yield from export.parent.glob(f"{export.stem}.bin")
        return
    files = (each for each in export.parent.iterdir() if each.is_file() and not each.name.startswith("."))
    yield from (each for each in files if each.suffix not in _NO_PARTS)


def _behind(folder: Path) -> Iterator[Path]:
    for each in sorted(set(module_folders(folder)) - {folder}):
        yield from sorted(each.glob("*.safetensors"))
