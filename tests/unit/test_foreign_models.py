"""Nobody's code runs because a model brought it: no pickled weights, no modules of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from millstream.broker.errors import ModelUnavailable
from millstream.broker.spec import ModelSpec


def load(folder: Path) -> object:
    # Torch takes seconds to import; most tests need none.
    from millstream.worker.models.embedding import EmbeddingModel

    return EmbeddingModel(ModelSpec(type="embedding", model_name=str(folder)), device="cpu", threads=1)


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


def test_pickled_weights_are_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = copied(tiny_model, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    with pytest.raises(ModelUnavailable):
        load(folder)


def test_a_models_own_code_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path)
    ran = tmp_path / "ran"
    (folder / "foreign.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "foreign.Config", "AutoModel": "foreign.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "foreign", "auto_map": own}))

    with pytest.raises(ModelUnavailable):
        load(folder)

    assert not ran.exists()
