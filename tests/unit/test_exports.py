"""Which exported file runs, what names it, and what is said where something is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rerankers import save_judge

from millstream.broker.errors import ModelUnavailable
from millstream.broker.spec import ModelSpec
from millstream.worker.models.embedding import EmbeddingModel
from millstream.worker.models.exports import export_digest, export_kwargs, exported
from millstream.worker.models.reranker import load_reranker

Files = Callable[..., Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Makes files in a model's folder."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        return tmp_path

    return make


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries, as far as loading asks for them."""
    for name in ("optimum", "optimum.onnxruntime", "optimum.intel", "optimum.intel.openvino"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(SessionOptions=SimpleNamespace))


def of(backend: str, **settings: Any) -> ModelSpec:
    return ModelSpec.model_validate({"type": "embedding", "model_name": "m", "backend": backend, **settings})


def found(spec: ModelSpec, folder: Path) -> str:
    return exported(spec, lambda name: folder / name if (folder / name).is_file() else None)


@pytest.mark.parametrize(
    ("backend", "there", "file"),
    [
        ("onnx", ["model.onnx", "onnx/model.onnx"], "model.onnx"),
        ("onnx", ["onnx/model.onnx", "onnx/model_O3.onnx"], "onnx/model.onnx"),
        ("openvino", ["openvino/openvino_model.xml", "onnx/model.onnx"], "openvino/openvino_model.xml"),
    ],
)
def test_the_file_is_the_one_that_the_library_would_take(
    backend: str, there: list[str], file: str, files: Files
) -> None:
    assert found(of(backend), files(*there)) == file


def test_a_file_that_is_named_is_the_one(files: Files) -> None:
    folder = files("model.onnx", "onnx/model_qint8_avx512.onnx")

    assert found(of("onnx", model_file="onnx/model_qint8_avx512.onnx"), folder) == "onnx/model_qint8_avx512.onnx"
    with pytest.raises(ModelUnavailable, match=r"'m' has no onnx/model_O4.onnx, which backend onnx runs"):
        found(of("onnx", model_file="onnx/model_O4.onnx"), folder)


def test_where_there_is_no_export_the_error_says_how_to_make_one(tiny_model: Path) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        EmbeddingModel(of("openvino", model_name=str(tiny_model)), "cpu", 1)

    assert "has no openvino_model.xml or openvino/openvino_model.xml" in caught.value.message
    assert caught.value.hint is not None
    assert 'SentenceTransformer(NAME, backend="openvino").save_pretrained(FOLDER)' in caught.value.hint


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_library_that_is_not_installed_is_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimum", None)

    with pytest.raises(ModelUnavailable, match=f"backend {backend}: ") as caught:
        export_kwargs(of(backend), "file", "cpu")

    assert caught.value.hint == f"pip install 'sentence-transformers[{backend}]'"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("device", "asked"),
    [
        ("cpu", {"provider": "CPUExecutionProvider"}),
        (None, {"provider": "CPUExecutionProvider"}),
        ("cuda", {"provider": "CUDAExecutionProvider", "provider_options": {"device_id": 0}}),
        ("cuda:1", {"provider": "CUDAExecutionProvider", "provider_options": {"device_id": 1}}),
    ],
)
def test_the_device_says_what_onnx_runs_on(
    device: str | None, asked: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    kwargs = dict(export_kwargs(of("onnx"), "model.onnx", device))

    assert kwargs.pop("session_options").intra_op_num_threads >= 1
    assert kwargs == {"file_name": "model.onnx", "export": False, **asked}


@pytest.mark.usefixtures("installed")
def test_openvino_computes_in_float32_on_the_cpu_alone() -> None:
    kwargs = export_kwargs(of("openvino"), "openvino_model.xml", None)

    assert kwargs["ov_config"]["INFERENCE_PRECISION_HINT"] == "f32"
    with pytest.raises(ModelUnavailable, match="openvino on cuda:0"):
        export_kwargs(of("openvino"), "openvino_model.xml", "cuda:0")


def test_a_language_model_runs_with_torch_alone(tmp_path: Path) -> None:
    folder = save_judge(tmp_path / "judge", "qwen3")

    with pytest.raises(ModelUnavailable, match="is a language model"):
        load_reranker(ModelSpec(type="reranker", model_name=str(folder), backend="onnx"), "cpu", 1)


@pytest.mark.parametrize(
    ("file", "counts", "does_not"),
    [
        ("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_O3.onnx"),
        ("onnx/model.onnx", "2_Dense/model.safetensors", "model.safetensors"),
        ("openvino/openvino_model.xml", "openvino/openvino_model.bin", "openvino/openvino_model_int8.bin"),
    ],
)
def test_what_runs_names_the_weights_and_nothing_else(file: str, counts: str, does_not: str, files: Files) -> None:
    before = export_digest(files(file), file)

    assert export_digest(files(does_not), file) == before
    with_it = export_digest(files(counts), file)
    (files() / file).write_text("other weights")

    assert len({before, with_it, export_digest(files(), file)}) == 3
