"""A model folder that lacks something, or has half of it, is refused, and the error names the file or the tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import rerankers
import torch
from embedders import save_dense, save_routed, save_sparse, save_static
from safetensors.torch import load_file, save_file

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models import load
from millstream.worker.models.loading import fetch
from millstream.worker.models.loading.parts import parts_of
from millstream.worker.models.loading.whole import check_whole

WEIGHTS = "model.safetensors"
NEEDLESS = ("README.md", "generation_config.json")
"""Files that no vector depends on."""

LONG = os.environ.get("MILLSTREAM_LONG") == "1"

Copied = Callable[[str], Path]


def start(kind: str, folder: Path) -> object:
    model = ModelSpec(type="embedding" if kind in EMBEDDERS else "reranker", model_name=str(folder))
    return load(ServiceSpec(name="mill", model=model, model_ref="m", runtime=Runtime()), "cpu", 1)


EMBEDDERS = ("embedding", "dense", "sparse", "routed")
KINDS = (*EMBEDDERS, "cross-encoder", "qwen3", "gpt2", "chatting judge")


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, whole."""
    root = tmp_path_factory.mktemp("saved")
    judge = rerankers.save_judge(root / "qwen3", "qwen3")
    cross_encoder = rerankers.save_cross_encoder(root / "cross-encoder")
    # transformers reads it only if there is no tokenizer.json.
    (cross_encoder / "vocab.txt").unlink()
    return {
        "embedding": tiny_model,
        "dense": save_dense(root / "dense", tiny_model),
        "sparse": save_sparse(tiny_model, root / "sparse"),
        "routed": save_routed(tiny_model, save_static(tiny_model, root / "static"), root / "routed"),
        "cross-encoder": cross_encoder,
        "qwen3": judge,
        "gpt2": rerankers.save_judge(root / "gpt2", "gpt2"),
        "chatting judge": rerankers.save_chatting_judge(root / "chat", judge),
    }


@pytest.fixture
def copied(saved: dict[str, Path], tmp_path: Path) -> Copied:
    return lambda kind: Path(shutil.copytree(saved[kind], tmp_path / "model", dirs_exist_ok=True))


def files_of(folder: Path) -> list[Path]:
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_folder_starts(copied: Copied, kind: str) -> None:
    folder = copied(kind)
    for name in NEEDLESS:
        (folder / name).unlink(missing_ok=True)

    assert start(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_one_of_its_files_a_model_does_not_start(saved: dict[str, Path], tmp_path: Path, kind: str) -> None:
    for file in files_of(saved[kind]):
        if file.name in NEEDLESS:
            continue
        folder = Path(shutil.copytree(saved[kind], tmp_path / file.as_posix().replace("/", "_")))
        (folder / file).unlink()

        with pytest.raises(ModelUnavailable, match=file.name):
            start(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_with_any_one_of_its_files_empty_cut_or_a_pointer_a_model_does_not_start(
    saved: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n"
    for number, file in enumerate(files_of(saved[kind])):
        if file.name in NEEDLESS:
            continue
        whole = (saved[kind] / file).read_bytes()
        # Half a template is a template.
        halves = () if file.suffix == ".jinja" else (whole[: len(whole) // 2],)
        for content in (b"", pointer, *halves):
            folder = Path(shutil.copytree(saved[kind], tmp_path / f"{number}-{len(content)}", dirs_exist_ok=True))
            (folder / file).write_bytes(content)

            with pytest.raises(ModelUnavailable, match=file.name):
                start(kind, folder)


Tensors = dict[str, torch.Tensor]


def lost(tensors: Tensors, name: str) -> None:
    del tensors[name]


def renamed(tensors: Tensors, name: str) -> None:
    tensors[f"_orig_mod.{name}"] = tensors.pop(name)


def reshaped(tensors: Tensors, name: str) -> None:
    tensors[name] = torch.zeros(3, 5)


def change_weights(file: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


CHANGES = [(kind, change) for kind in KINDS for change in (lost, renamed, reshaped) if LONG or change is lost]
"""A lost tensor for each kind, the other changes for some. MILLSTREAM_LONG=1 tries each change for each kind."""
if not LONG:
    CHANGES += [("embedding", renamed), ("embedding", reshaped), ("qwen3", renamed), ("cross-encoder", reshaped)]


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_with_any_one_tensor_lost_renamed_or_reshaped_a_model_does_not_start(
    saved: dict[str, Path], tmp_path: Path, kind: str, change: Callable[[Tensors, str], None]
) -> None:
    for file in (each for each in files_of(saved[kind]) if each.name == WEIGHTS):
        for number, name in enumerate(sorted(load_file(saved[kind] / file))):
            if kind in EMBEDDERS and name.startswith("pooler.") and change is not reshaped:
                # Nothing reads it: see test_whole_weights.py.
                continue
            folder = Path(shutil.copytree(saved[kind], tmp_path / f"{file.parent.name}{number}"))
            change_weights(folder / file, lambda tensors, name=name: change(tensors, name))  # type: ignore[misc]

            # transformers 5.0 still saves the names beta and gamma, for bias and weight.
            last = {"beta": "bias", "gamma": "weight"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
            with pytest.raises(ModelUnavailable, match=last):
                start(kind, folder)
            shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["embedding", "cross-encoder", "qwen3"])
def test_all_names_with_a_prefix_are_no_names(copied: Copied, kind: str) -> None:
    """As torch.compile writes them."""
    folder = copied(kind)

    def prefix(tensors: Tensors) -> None:
        for name in list(tensors):
            renamed(tensors, name)

    change_weights(folder / WEIGHTS, prefix)

    with pytest.raises(ModelUnavailable, match="lack the tensor"):
        start(kind, folder)


@pytest.fixture
def sharded(copied: Copied) -> Path:
    """An embedding model with its weights in two files, and an index."""
    folder = copied("embedding")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(names)}
    for place in set(places.values()):
        some = {name: tensors[name] for name in names if places[name] == place}
        save_file(some, folder / place, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder


def test_sharded_weights_start(sharded: Path) -> None:
    assert start("embedding", sharded)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_without_a_shard_or_their_index_a_model_does_not_start(sharded: Path, name: str) -> None:
    (sharded / name).unlink()

    with pytest.raises(ModelUnavailable, match=r"model-00002-of-00002\.safetensors|model\.safetensors"):
        start("embedding", sharded)


@pytest.mark.parametrize("file", [WEIGHTS, f"2_Dense/{WEIGHTS}"])
def test_a_model_that_the_hub_has_as_pickles_alone_is_not_to_be_downloaded_again(
    copied: Copied, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied("dense")
    (folder / file).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(fetch, "snapshot_download", lambda *args, **kwargs: str(folder))

    with pytest.raises(ModelUnavailable, match=f"'mill/pickles' has no {file} on the hub") as caught:
        fetch.fetch_folder(ModelSpec(type="embedding", model_name="mill/pickles"))

    assert "refs/pr/N" in caught.value.hint
    assert "again" not in caught.value.hint


def in_the_first_layout(folder: Path, kind: str) -> None:
    """Makes of a folder one that a release before 5.4 wrote, without the settings of its transformer."""
    (folder / "sentence_bert_config.json").unlink()
    modules = json.loads((folder / "modules.json").read_text())
    for module, name in zip(modules, (kind, "Pooling"), strict=False):
        module["type"] = f"sentence_transformers.models.{name}"
    (folder / "modules.json").write_text(json.dumps(modules))


def test_a_folder_of_the_first_layout_may_lack_the_limit_of_a_text(
    copied: Copied, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("embedding")
    in_the_first_layout(folder, "Transformer")

    start("embedding", folder)

    assert "sentence_bert_config.json is missing" in caplog.text


def test_a_clip_model_as_it_was_published_is_whole(copied: Copied, caplog: pytest.LogCaptureFixture) -> None:
    folder = copied("embedding")
    in_the_first_layout(folder, "CLIPModel")

    check_whole(folder, parts_of(folder), "torch")

    assert not caplog.text


def test_a_default_prompt_that_is_not_there_is_no_empty_one(copied: Copied) -> None:
    folder = copied("chatting judge")
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prompts": {}}))

    with pytest.raises(ModelUnavailable, match=r"config_sentence_transformers\.json.*'task'"):
        start("chatting judge", folder)


def test_an_adapter_is_refused_for_the_model_that_it_needs_may_differ(copied: Copied) -> None:
    folder = copied("embedding")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "mill/other"}')

    with pytest.raises(ModelUnavailable, match=r"adapter_config\.json"):
        start("embedding", folder)
