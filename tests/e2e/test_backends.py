"""ONNX and OpenVINO, installed as a user installs them, in an environment beside this one.

Each brings versions of transformers and sentence-transformers of its own, so it takes a minute to make:

    MILLSTREAM_LONG=1 scripts/test tests/e2e/test_backends.py
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from rerankers import save_cross_encoder
from sentence_transformers import CrossEncoder, SentenceTransformer

CLOSE = 1e-5
TEXTS = ["a mill", "", "the stream turns the mill", "water " * 20, "corn"]
QUERY, DOCUMENTS = "the mill", ["a miller grinds corn", "the stream", "the mill turns"]

EXPORT = """\
import sys
from sentence_transformers import CrossEncoder, SentenceTransformer
backend, kind, source, folder = sys.argv[1:]
kind = {"embedding": SentenceTransformer, "reranker": CrossEncoder}[kind]
kind(source, backend=backend, device="cpu", model_kwargs={"export": True}).save_pretrained(folder)
"""

ASK = """\
import json, sys
from millstream.client import Client
texts, query, documents = json.loads(sys.argv[1])
with Client.local("config.yaml", data_dir="data") as client:
    vectors = client.embed(texts)
    ranking = sorted(client.rerank(query, documents), key=lambda one: one.index)
    print(json.dumps([[list(map(float, vector)) for vector in vectors], [one.score for one in ranking]]))
"""


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def python(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the backend, and what it does not bring from here."""
    folder = tmp_path_factory.mktemp(backend)
    venv.create(folder, with_pip=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    here = site.getsitepackages()[0]
    (packages / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    python = folder / "bin" / "python"
    words = ["-m", "pip", "install", "-q", f"sentence-transformers[{backend}]", f"torch=={torch.__version__}"]
    subprocess.run([python, *words], check=True)
    # OpenVINO's wants it for images alone, and the one of the index was built for torch with CUDA.
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision"], check=True)
    return python


def said(python: Path, folder: Path, program: str, *words: str) -> str:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MILLSTREAM_")}
    done = subprocess.run(
        [python, "-c", program, *words], cwd=folder, env=environ, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def test_exported_models_answer_what_torch_answers_to_each_row_alone(
    backend: str, python: Path, tiny_model: Path, tmp_path: Path
) -> None:
    ranker = save_cross_encoder(tmp_path / "ranker")
    said(python, tmp_path, EXPORT, backend, "embedding", str(tiny_model), "embed")
    said(python, tmp_path, EXPORT, backend, "reranker", str(ranker), "rank")
    models = {
        name: {"type": kind, "model_name": f"./{name}", "backend": backend, "device": "cpu"}
        for name, kind in (("embed", "embedding"), ("rank", "reranker"))
    }
    services = {name: {"model": name, "runtime": {"worker_count": 1, "truncate": "end"}} for name in models}
    (tmp_path / "config.yaml").write_text(json.dumps({"models": models, "services": services}))

    answer = json.loads(said(python, tmp_path, ASK, json.dumps([TEXTS, QUERY, DOCUMENTS])).splitlines()[-1])

    encoder, scorer = SentenceTransformer(str(tiny_model), device="cpu"), CrossEncoder(str(ranker), device="cpu")
    vectors = np.stack([encoder.encode([text])[0] for text in TEXTS])
    scores = [scorer.predict([(QUERY, document)])[0] for document in DOCUMENTS]
    assert np.abs(np.array(answer[0]) - vectors).max() < CLOSE
    assert np.abs(np.array(answer[1]) - scores).max() < CLOSE
