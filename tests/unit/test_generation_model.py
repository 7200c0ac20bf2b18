"""Language models are loaded, refused by the type of a layer, and proved; prompts are checked before they run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from generating import load

from millstream.broker.config.spec import Runtime
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, ModelUnavailable
from millstream.worker.measuring.warmup import warm_up
from millstream.worker.models.base import Adapts, Generates, Placed, Prepared, Reads
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.window import Window

Folders = Mapping[str, Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("language-models")


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    import language_models

    return language_models.save_language_model(home / "llama", "llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder, slots=4, tokens=256)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mistral", "sliding_attention"),
        ("gemma2", "sliding_attention"),
        ("mamba", "linear_attention"),
        ("t5", "encoder and a decoder"),
        ("bloom", "attention of BloomForCausalLM cannot be replaced"),
    ],
)
def test_a_model_that_the_engine_cannot_run_is_refused_by_the_type_of_its_layer(
    home: Path, folder: Path, kind: str, names: str
) -> None:
    import architectures
    import language_models
    import torch
    import transformers

    target = home / kind
    if kind == "mistral":
        language_models.save_language_model(target, kind)
    else:
        type_, settings = architectures.ENCODERS[kind]
        config = transformers.AutoConfig.for_model(type_, vocab_size=300, **settings)
        auto: Any = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
        with torch.random.fork_rng():
            auto.from_config(config).save_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(target)

    with pytest.raises(ModelUnavailable, match=names):
        load(target)


def test_a_model_whose_attention_differs_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from millstream.worker.generation import attention

    plain = attention.Growing.attend

    def attend(self: Any, *args: Any) -> Any:
        return 1.01 * plain(self, *args)

    monkeypatch.setattr(attention.Growing, "attend", attend)
    with pytest.raises(ModelUnavailable, match="differ by"):
        load(folder)


def test_a_model_that_asks_for_more_than_plain_attention_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    plain: Any = modeling_llama.LlamaAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs, **({"softcap": 30.0} if "groups" in kwargs else {}))

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with pytest.raises(ModelUnavailable, match="softcap"):
        load(folder)


def test_a_fingerprint_names_weights_dtype_and_generation_config(home: Path, folder: Path, model: Any) -> None:
    import shutil

    copy = shutil.copytree(folder, home / "copy")
    assert load(copy).fingerprint == model.fingerprint
    assert "float64" in model.fingerprint
    assert load(copy, dtype="float32").fingerprint != model.fingerprint
    config = copy / "generation_config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 0', '"eos_token_id": 5'))
    assert load(copy).fingerprint != model.fingerprint


def test_a_model_has_what_a_worker_asks_for(model: Any) -> None:
    assert isinstance(model, Generates)
    assert isinstance(model, Adapts)
    assert isinstance(model, Reads)
    assert isinstance(model, Placed)
    assert model.limit.tokens == 512
    assert (model.device_type, model.backend) == ("cpu", "torch")


def test_a_worker_can_warm_it_up(model: Any) -> None:
    window = Window(Budget(4, 256))

    warm_up(model, window)

    assert window.cost.seconds_per_token > 0


@pytest.mark.parametrize(
    ("value", "options", "error", "says"),
    [
        ("", {}, InvalidRequest, "empty prompt"),
        (5, {}, InvalidRequest, "of type int"),
        ({"token_ids": [1, 999]}, {}, InvalidRequest, "no token 999"),
        ({"token_ids": [1] * 512}, {}, InvalidRequest, "512 tokens"),
        ({"token_ids": [1] * 256}, {}, InvalidRequest, "the cache holds 256"),
        ("a mill", {"colour": 1}, InvalidRequest, "colour"),
        ("a mill", {"stop_token_ids": [999]}, InvalidRequest, "stop_token_ids"),
        ("a mill", {"logit_bias": {"999": 1.0}}, InvalidRequest, "logit_bias"),
        ("a mill", {"temperature": -1.0}, InvalidRequest, "temperature"),
        ("a mill", {"top_k": -1}, InvalidRequest, "top_k"),
        ("a mill", {"response_format": {"type": "regex", "pattern": "(["}}, InvalidRequest, "response_format"),
        ({"token_ids": []}, {}, InvalidRequest, "token_ids"),
        ({"token_ids": [-1]}, {}, InvalidRequest, "token_ids"),
        ({"messages": []}, {}, InvalidRequest, "messages"),
        ({"messages": [{"role": "miller", "content": "a"}]}, {}, InvalidRequest, "role 'miller'"),
    ],
)
def test_a_request_that_cannot_run_is_refused_before_it_runs(
    model: Any, value: Any, options: Any, error: type[Exception], says: str
) -> None:
    (row,) = model.prepare([value], options)

    assert isinstance(row, error)
    assert says in str(row)


def test_a_prompt_longer_than_the_context_is_refused(folder: Path) -> None:
    (row,) = load(folder).prepare([{"token_ids": [1] * 512}], {})

    assert isinstance(row, InputTooLong)


def test_messages_go_through_the_chat_template(model: Any) -> None:
    messages = [{"role": "user", "content": "who?"}]
    chat, text = model.prepare([{"messages": messages}, "<user>: who?\nanswer:"], {})

    assert isinstance(chat, Prepared)
    assert isinstance(text, Prepared)
    tokens: Any = chat.features
    assert tokens.tokens == text.features.tokens  # type: ignore[attr-defined]


def test_pushed_limits_reach_the_engine(model: Any) -> None:
    engine = model.start_engine()
    model.adapt(Runtime(batch_size=7, max_batch_tokens=1_024))
    engine.step()

    assert engine.room() == Budget(7, 1_024, packs=True)
    model.adapt(Runtime(batch_size=4, max_batch_tokens=256))
