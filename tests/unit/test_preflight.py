"""What is found wrong with a service before any worker process starts."""

from __future__ import annotations

import importlib.util

import pytest

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import ModelUnavailable
from millstream.broker.contract.operations import ModelType
from millstream.worker.supervision.plan import preflight


def service(type_: ModelType, model_name: str = "") -> ServiceSpec:
    model = ModelSpec(type=type_, model_name=model_name)
    return ServiceSpec(name="mill", model=model, model_ref="m", runtime=Runtime())


def test_a_missing_model_library_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sentence_transformers" else found(name)
    )

    with pytest.raises(ModelUnavailable, match=r"needs sentence_transformers, .*millstream\[worker\]"):
        preflight([service("embedding", "some/model")])


def test_a_missing_model_library_does_not_trouble_a_type_that_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    preflight([service("echo")])


def test_a_rerankers_weights_are_looked_for_before_any_worker_starts() -> None:
    with pytest.raises(ModelUnavailable, match="no model folder"):
        preflight([service("reranker", "./no-such-folder")])
