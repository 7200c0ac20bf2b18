"""Which exported file runs, what names it, and what is said where something is missing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from embedders import save_static
from rerankers import save_judge
from sentence_transformers import SentenceTransformer

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models.embedding.embedding import EmbeddingModel
from millstream.worker.models.loading.exports import Export, export_digest, export_file, find_export
from millstream.worker.models.loading.fetch import fetch_folder
from millstream.worker.models.reranking.reranker import load_reranker

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
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both libraries, as far as loading asks for them; what ONNX Runtime says it runs on."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    runtime = {"SessionOptions": SimpleNamespace, "get_available_providers": lambda: providers}
    for name in ("optimum", "optimum.onnxruntime", "optimum.intel", "optimum.intel.openvino"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(**runtime))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return providers


def of(backend: str, **settings: Any) -> ModelSpec:
    return ModelSpec.model_validate({"type": "embedding", "model_name": "m", "backend": backend, **settings})


def asked(backend: str, folder: Path, device: str | None) -> Export:
    return find_export(folder, of(backend), device, "SentenceTransformer")


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
    assert export_file(files(*there), of(backend)) == file


def test_a_file_that_is_named_is_the_one(files: Files) -> None:
    folder = files("model.onnx", "onnx/model_qint8_avx512.onnx")

    quantised = "onnx/model_qint8_avx512.onnx"
    assert export_file(folder, of("onnx", model_file=quantised)) == quantised
    with pytest.raises(ModelUnavailable, match=r"'m' has no onnx/model_O4.onnx, which backend onnx runs"):
        export_file(folder, of("onnx", model_file="onnx/model_O4.onnx"))


def test_where_there_is_no_export_the_error_says_how_to_make_one(tiny_model: Path) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        EmbeddingModel(of("openvino", model_name=str(tiny_model)), "cpu", 1)

    assert "has no openvino_model.xml or openvino/openvino_model.xml" in caught.value.message
    assert caught.value.hint is not None
    assert 'SentenceTransformer(NAME, backend="openvino").save_pretrained(FOLDER)' in caught.value.hint


def test_a_model_of_the_hub_is_to_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    with pytest.raises(ModelUnavailable, match="runs a model from a folder") as caught:
        fetch_folder(of("onnx", model_name="mill/tiny"))

    assert caught.value.hint is not None
    assert "hf download mill/tiny --local-dir FOLDER" in caught.value.hint


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_library_that_is_not_installed_is_named(backend: str, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimum", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(ModelUnavailable, match=f"backend {backend}: ") as caught:
        asked(backend, files("model.onnx", "openvino_model.xml"), "cpu")

    assert caught.value.hint == f"pip install 'sentence-transformers[{backend}]'"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("device", "where", "options"),
    [
        ("cpu", "cpu", {"provider": "CPUExecutionProvider"}),
        (None, "cpu", {"provider": "CPUExecutionProvider"}),
        ("auto", "cpu", {"provider": "CPUExecutionProvider"}),
        ("cuda", "cuda", {"provider": "CUDAExecutionProvider", "provider_options": {"device_id": 0}}),
        ("cuda:1", "cuda:1", {"provider": "CUDAExecutionProvider", "provider_options": {"device_id": 1}}),
    ],
)
def test_the_device_says_what_onnx_runs_on(
    device: str | None, where: str, options: dict[str, object], files: Files
) -> None:
    export = asked("onnx", files("model.onnx"), device)

    kwargs = dict(export.kwargs)
    assert export.device == where
    assert kwargs.pop("session_options").intra_op_num_threads >= 1
    assert kwargs == {"file_name": "model.onnx", "export": False, **options}


def test_a_gpu_needs_the_runtime_for_it(installed: list[str], files: Files) -> None:
    installed.remove("CUDAExecutionProvider")

    with pytest.raises(ModelUnavailable, match="is for the CPU") as caught:
        asked("onnx", files("model.onnx"), "cuda:0")

    assert caught.value.hint == "pip install 'sentence-transformers[onnx-gpu]'"
    with pytest.raises(ModelUnavailable, match="onnx on mps"):
        asked("onnx", files("model.onnx"), "mps")


@pytest.mark.usefixtures("installed")
def test_openvino_computes_in_float32_on_the_cpu_alone(files: Files) -> None:
    folder = files("openvino_model.xml")

    export = asked("openvino", folder, None)

    assert export.device == "cpu", "the modules behind it belong beside it"
    assert export.kwargs["ov_config"]["INFERENCE_PRECISION_HINT"] == "f32"
    with pytest.raises(ModelUnavailable, match="openvino on cuda:0"):
        asked("openvino", folder, "cuda:0")


@pytest.mark.usefixtures("installed")
def test_a_model_that_has_nothing_to_export_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = save_static(tiny_model, tmp_path / "static")
    (folder / "model.onnx").write_text("of another model")

    with pytest.raises(ModelUnavailable, match="whose first module is a StaticEmbedding"):
        EmbeddingModel(of("onnx", model_name=str(folder)), "cpu", 1)


@pytest.mark.usefixtures("installed")
def test_whatever_the_library_raises_is_an_error_of_the_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "model.onnx").write_text("no protobuf")

    def broken(*args: object, **kwargs: object) -> object:
        raise Exception("INVALID_PROTOBUF: Load model failed")

    monkeypatch.setattr(SentenceTransformer, "__init__", broken)

    with pytest.raises(ModelUnavailable, match="INVALID_PROTOBUF"):
        EmbeddingModel(of("onnx", model_name=str(folder)), "cpu", 1)


def test_a_language_model_runs_with_torch_alone(tmp_path: Path) -> None:
    folder = save_judge(tmp_path / "judge", "qwen3")

    with pytest.raises(ModelUnavailable, match="is a language model"):
        load_reranker(ModelSpec(type="reranker", model_name=str(folder), backend="onnx"), "cpu", 1)


MODULES = '[{"idx": 0, "path": "", "type": "Transformer"}, {"idx": 1, "path": "2_Dense", "type": "Dense"}]'


@pytest.mark.parametrize(
    ("file", "counts", "does_not"),
    [
        ("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_O3.onnx"),
        ("onnx/model.onnx", "onnx/onnx__MatMul_12", "README.md"),
        ("model.onnx", "weights.data", "model.safetensors"),
        ("onnx/model.onnx", "2_Dense/model.safetensors", "checkpoint-9/model.safetensors"),
        ("openvino/openvino_model.xml", "openvino/openvino_model.bin", "openvino/openvino_model_int8.bin"),
    ],
)
def test_what_runs_names_the_weights_and_nothing_else(file: str, counts: str, does_not: str, files: Files) -> None:
    (files() / "modules.json").write_text(MODULES)
    before = export_digest(files(file), file)

    assert export_digest(files(does_not), file) == before
    with_it = export_digest(files(counts), file)
    (files() / file).write_text("other weights")

    assert len({before, with_it, export_digest(files(), file)}) == 3
