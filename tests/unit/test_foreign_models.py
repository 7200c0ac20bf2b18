"""Nobody's code runs because a model brought it, no pickle is opened, and nothing outside of its folder is read."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.errors import ModelUnavailable

Model = Callable[[str], Path]


def load(folder: Path, kind: str = "embedding") -> object:
    # Torch takes seconds to import; most tests need none.
    from millstream.broker.config.spec import Runtime, ServiceSpec
    from millstream.worker.models import load

    model = ModelSpec(type=kind, model_name=str(folder))
    return load(ServiceSpec(name="mill", model=model, model_ref="m", runtime=Runtime()), "cpu", 1)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> Any:
        return Path.touch, (self._ran,)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """There once something foreign has run."""
    return tmp_path / "ran"


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """Copies a model of a kind, with code of its own, which the interpreter would find as well."""
    import rerankers
    from embedders import save_dense, save_routed, save_static

    def make(kind: str) -> Path:
        folder, source = tmp_path / "model", tmp_path / "source"
        made = {
            "embedding": lambda: tiny_model,
            "dense": lambda: save_dense(source, tiny_model),
            "routed": lambda: save_routed(tiny_model, save_static(tiny_model, tmp_path / "static"), source),
            "cross-encoder": lambda: rerankers.save_cross_encoder(source),
            "qwen3": lambda: rerankers.save_judge(source, "qwen3"),
        }[kind]()
        shutil.copytree(made, folder)
        (folder / "foreign.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
        monkeypatch.syspath_prepend(folder)
        return folder

    yield make
    sys.modules.pop("foreign", None)


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refused(folder: Path, ran: Path, match: str, kind: str = "embedding") -> None:
    with pytest.raises(ModelUnavailable, match=match):
        load(folder, kind)

    assert not ran.exists()
    assert "foreign" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "foreign.Module",
        "os.system",
        "sentence_transformers.base.model.pickle",
        "sentence_transformers.base.modules.module.torch",
        "sentence_transformers.util.import_from_string",
        "sentence_transformers.base.modules.module.nn.Linear",
        "sentence_transformers.no_such.Module",
        "sentence_transformersforeign.Module",
        None,
    ],
)
def test_a_module_that_is_not_the_librarys_is_refused(model: Model, ran: Path, name: str | None) -> None:
    folder = model("embedding")
    edit(folder / "modules.json", lambda modules: modules[1].update(type=name))

    refused(folder, ran, r"modules\.json: it names the module")


def test_a_routers_module_that_is_not_the_librarys_is_refused(model: Model, ran: Path) -> None:
    folder = model("routed")
    edit(
        folder / "router_config.json", lambda router: router["types"].update({next(iter(router["types"])): "foreign.M"})
    )

    refused(folder, ran, r"router_config\.json: it names the module 'foreign\.M'")


@pytest.mark.parametrize("path", ["../elsewhere", "/tmp", "1_Pooling/../../elsewhere", "..\\elsewhere", 7, None])
@pytest.mark.parametrize("listing", ["modules.json", "router_config.json"])
def test_a_path_out_of_the_folder_is_refused(model: Model, ran: Path, listing: str, path: object) -> None:
    folder = model("embedding" if listing == "modules.json" else "routed")
    (folder.parent / "elsewhere").mkdir()
    if listing == "modules.json":
        edit(folder / listing, lambda modules: modules[1].update(path=path))
    elif isinstance(path, str):
        edit(folder / listing, lambda router: router["types"].update({path: "sentence_transformers.models.Pooling"}))
    else:
        edit(folder / listing, lambda router: router.update(types=path))

    refused(folder, ran, listing)


def test_a_shard_out_of_the_folder_is_refused(model: Model, ran: Path) -> None:
    folder = model("embedding")
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"embeddings.LayerNorm.bias": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    refused(folder, ran, r"index\.json: it names the path '\.\./model\.safetensors'")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "1_Pooling", "1_Pooling/config.json"])
def test_a_link_out_of_the_folder_is_refused(model: Model, ran: Path, name: str) -> None:
    folder = model("embedding")
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")

    refused(folder, ran, f"{name}: it leads out of the model's folder")


def test_links_within_the_folder_and_to_the_hubs_cache_are_followed(model: Model, tmp_path: Path) -> None:
    folder = model("embedding")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert load(folder)

    cache = tmp_path / "models--mill--tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = folder.rename(cache / "snapshots" / "0123")
    (snapshot / "weights").rename(cache / "blobs" / "4567")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/4567")

    assert load(snapshot)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt"])
@pytest.mark.parametrize(("kind", "place"), [("embedding", "."), ("dense", "2_Dense"), ("embedding", "1_Pooling")])
def test_pickled_weights_of_any_module_are_not_opened(
    model: Model, ran: Path, kind: str, place: str, suffix: str
) -> None:
    folder = model(kind)
    (folder / place / "model.safetensors").unlink(missing_ok=True)
    (folder / place / f"pytorch_model.{suffix}").write_bytes(pickle.dumps(Trap(ran)))

    refused(folder, ran, f"pytorch_model.{suffix}: its weights are pickled")


@pytest.mark.parametrize("kind", ["cross-encoder", "qwen3"])
def test_pickled_weights_of_a_reranker_are_not_opened(model: Model, ran: Path, kind: str) -> None:
    folder = model(kind)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(ran)))

    refused(folder, ran, r"pytorch_model\.bin: its weights are pickled", "reranker")


@pytest.mark.parametrize("place", [".", "2_Dense"])
def test_pickles_beside_safetensors_are_left_alone(model: Model, ran: Path, place: str) -> None:
    """Many published models have both."""
    folder = model("dense")
    (folder / place / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(ran)))

    assert load(folder)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["embedding", "cross-encoder", "qwen3"])
@pytest.mark.parametrize("model_type", ["foreign", ""])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_models_own_code_is_not_run(model: Model, ran: Path, kind: str, model_type: str, file: str) -> None:
    folder = model(kind)
    own = {"AutoConfig": "foreign.Config", "AutoModel": "foreign.Model", "AutoTokenizer": ["foreign.Tokenizer", None]}
    edit(folder / file, lambda config: config.update(auto_map=own))
    if model_type:
        edit(folder / "config.json", lambda config: config.update(model_type=model_type))

    refused(folder, ran, rf"{file}: its auto_map names code", "embedding" if kind == "embedding" else "reranker")


def test_a_model_that_transformers_has_integrated_runs_without_its_code(model: Model, ran: Path) -> None:
    folder = model("embedding")
    own = {
        "AutoConfig": "foreign.BertConfig",
        "AutoModel": "mill/code--foreign.BertModel",
        "AutoModelForX": "foreign.X",
    }
    edit(folder / "config.json", lambda config: config.update(auto_map=own))

    assert load(folder)
    assert not ran.exists()
    assert "foreign" not in sys.modules


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("config.json", {"AutoModel": "foreign.BertModel"}),
        ("config.json", {"AutoModel": "foreign.BertModel", "AutoModelForMaskedLM": "foreign.BertForMaskedLM"}),
        ("config.json", {"AutoConfig": "foreign.RobertaConfig", "AutoModel": "foreign.BertModel"}),
        ("config.json", {"AutoConfig": "foreign.BertConfig", "AutoModel": "foreign.RobertaModel"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["foreign.BertTokenizer", "foreign.BertTokenizerFast"]}),
    ],
)
def test_code_under_the_names_of_transformers_classes_is_not_taken_for_them(
    model: Model, ran: Path, file: str, own: dict[str, object]
) -> None:
    """Published models change a known class this way, and keep its name: bidirectional attention, one more token."""
    folder = model("embedding")
    edit(folder / file, lambda config: config.update(auto_map=own))

    refused(folder, ran, rf"{file}: its auto_map names code of its own")


def test_a_tokenizers_code_was_integrated_with_its_model(model: Model, ran: Path) -> None:
    folder = model("embedding")
    edit(folder / "config.json", lambda config: config.update(auto_map={"AutoConfig": "foreign.BertConfig"}))
    own = {"AutoTokenizer": ["foreign.BertTokenizer", None]}
    edit(folder / "tokenizer_config.json", lambda config: config.update(auto_map=own))

    assert load(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"config_kwargs": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"tokenizer_name_or_path": "mill/other"}, "a tokenizer elsewhere"),
        ({"tokenizer_args": {"vocab_file": "/etc/hostname"}}, r"tokenizer_args\.vocab_file"),
        ({"model_args": {"cache_dir": "/tmp"}}, r"model_args\.cache_dir"),
        ({"model_kwargs": {"attn_implementation": "mill/kernel"}}, "code on the hub"),
    ],
)
def test_settings_that_lead_elsewhere_are_refused(
    model: Model, ran: Path, settings: dict[str, object], match: str
) -> None:
    folder = model("embedding")
    edit(folder / "sentence_bert_config.json", lambda config: config.update(settings))

    refused(folder, ran, rf"sentence_bert_config\.json: .*{match}")


@pytest.mark.parametrize("name", ["foreign.Activation", "torch.load", "torch.nn.init.zeros_", "os.getcwd"])
def test_an_activation_that_is_not_torchs_is_refused(model: Model, ran: Path, name: str) -> None:
    """The library would take another one, and only warn."""
    folder = model("dense")
    edit(folder / "2_Dense" / "config.json", lambda config: config.update(activation_function=name))

    refused(folder, ran, r"2_Dense/config\.json: activation_function names")


def test_a_cross_encoders_activation_that_is_not_torchs_is_refused(model: Model, ran: Path) -> None:
    folder = model("cross-encoder")
    own = {"activation_fn": "foreign.Activation"}
    edit(folder / "config.json", lambda config: config.update(sentence_transformers=own))

    refused(folder, ran, r"config\.json: activation_fn names", "reranker")
