"""Models exported to ONNX or OpenVINO: the file, its device, its loading arguments and its digest.

The export is made beforehand, with sentence-transformers: a worker would have to repeat it at each start.
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
    """An exported model: the device for it and for the modules after it, and the arguments to load it."""

    device: str
    kwargs: dict[str, Any]
    """Arguments of from_pretrained."""


def needs_folder(source: str, spec: ModelSpec) -> ModelUnavailable:
    """Returns the error of an exported model that is on the hub, not in a folder."""
    return ModelUnavailable(
        f"backend {spec.backend} runs a model from a folder, {spec.model_name!r} is on the hub",
        hint=f"download it (hf download {source} --local-dir FOLDER) and give the folder",
    )


def find_export(source: Path, spec: ModelSpec, device: str | None, kind: str) -> Export:
    """Returns the export of a model of `kind`, a class of sentence-transformers. Raises ModelUnavailable."""
    file = export_file(source, spec, kind)
    refuse_links(source, (source / file).parent)
    for part in _parts(source / file):
        check_content(part)
    _check_installed(spec.backend)
    place = _onnx_device(device) if spec.backend == "onnx" else _openvino_device(device)
    options = _onnx(place) if spec.backend == "onnx" else _openvino()
    return Export(place, {"file_name": file, "export": False, **options})


def export_file(folder: Path, spec: ModelSpec, kind: str = "SentenceTransformer") -> str:
    """Returns the path of the exported file, relative to `folder`. Raises ModelUnavailable if there is none."""
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
    # Without the hint OpenVINO computes in bfloat16 if the CPU can, also for a float32 file.
    config = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads()), "INFERENCE_PRECISION_HINT": "f32"}
    return {"device": "cpu", "ov_config": config}


def check_runs(model: torch.nn.Module, spec: ModelSpec) -> None:
    """Raises ModelUnavailable if sentence-transformers ignored the backend and loaded weights for torch."""
    first = next(model.children(), model)
    if isinstance(getattr(first, "model", first), torch.nn.Module):
        raise ModelUnavailable(
            f"backend {spec.backend} does not run {spec.model_name!r}, whose first module is a {type(first).__name__}",
            hint="leave backend out",
        )


def export_digest(folder: Path, file: str) -> str:
    """Returns the SHA-256, in hex, over all files of the model in `folder` that run.

    They are the exported file, the files beside it that hold weights too large for one file, and the weights of the
    modules after it, which torch runs.
    """
    digest = hashlib.sha256()
    for each in (*sorted(_parts(folder / file)), *_behind(folder)):
        with each.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


_NO_PARTS = {".json", ".jinja", ".md", ".model", ".onnx", ".safetensors", ".txt", ".xml", ".yaml"}
"""Suffixes of files beside an ONNX file that hold none of its weights. The files that do may have any name."""


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
