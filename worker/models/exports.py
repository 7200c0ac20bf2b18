"""Models exported to ONNX or OpenVINO: which file runs, how it is loaded, and what names it.

The export is made beforehand, by sentence-transformers: a worker that exports as it starts would do so at each start.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from millstream.broker.config import ModelSpec
from millstream.broker.errors import ModelUnavailable

_FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
_LIBRARIES = {"onnx": "optimum.onnxruntime", "openvino": "optimum.intel.openvino"}

Where = Callable[[str], Path | None]
"""The path of a file below the model's folder, None where it has no such file."""


def exported(spec: ModelSpec, where: Where) -> str:
    """The file to run, below the model's folder. Raises ModelUnavailable."""
    default = _FILES[spec.backend]
    names = [spec.model_file] if spec.model_file else [default, f"{spec.backend}/{default}"]
    for name in names:
        if where(name):
            return name
    raise ModelUnavailable(
        f"{spec.model_name!r} has no {' or '.join(names)}, which backend {spec.backend} runs",
        hint=f'export it with SentenceTransformer(NAME, backend="{spec.backend}").save_pretrained(FOLDER), or name '
        "another model_file",
    )


def export_kwargs(spec: ModelSpec, file: str, device: str | None) -> Mapping[str, Any]:
    """How `file` is to be loaded, as from_pretrained takes it. Raises ModelUnavailable where its library is missing."""
    try:
        importlib.import_module(_LIBRARIES[spec.backend])
    except ImportError as error:
        raise ModelUnavailable(
            f"backend {spec.backend}: {error}", hint=f"pip install 'sentence-transformers[{spec.backend}]'"
        ) from error
    options = _onnx(device) if spec.backend == "onnx" else _openvino(device)
    return {"file_name": file, "export": False, **options}


def _onnx(device: str | None) -> Mapping[str, Any]:
    options = importlib.import_module("onnxruntime").SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    kind, _, number = (device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    if kind == "cuda":
        cuda = {"provider": "CUDAExecutionProvider", "provider_options": {"device_id": int(number or 0)}}
        return {**cuda, "session_options": options}
    return {"provider": "CPUExecutionProvider", "session_options": options}


def _openvino(device: str | None) -> Mapping[str, Any]:
    if device not in (None, "auto", "cpu"):
        raise ModelUnavailable(f"backend openvino on {device}: it runs on the CPU here", hint="set device: cpu")
    # By default it computes in bfloat16 wherever the CPU can, whatever the file holds.
    config = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads()), "INFERENCE_PRECISION_HINT": "f32"}
    return {"device": "cpu", "ov_config": config}


def export_digest(folder: Path, file: str) -> str:
    """SHA-256 over what runs of the model in `folder`: the exported file, the weights it keeps beside itself because
    they are too large for one, and those of the modules behind it, which torch runs. In hex.
    """
    export = folder / file
    beside = [each for each in export.parent.iterdir() if _is_part(each, export)]
    digest = hashlib.sha256()
    for each in (*sorted(beside), *sorted(folder.glob("*/**/*.safetensors"))):
        with each.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _is_part(file: Path, export: Path) -> bool:
    is_openvino = export.suffix == ".xml" and file.name == f"{export.stem}.bin"
    return file.name.startswith(export.name) or is_openvino
