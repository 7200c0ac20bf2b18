"""`durability: replicated` travels with each service, and is nothing for a server without replicas."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from millstream.broker.config.load import load
from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import ConfigError
from millstream.cli.main import main

FILE = """
models: {m: {type: echo}}
services: {one: {model: m}}
redis: {durability: DURABILITY}
"""


def written(folder: Path, durability: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(FILE.replace("DURABILITY", durability))
    return path


@pytest.mark.parametrize(("durability", "replicated"), [("everysec", False), ("always", False), ("replicated", True)])
def test_what_is_published_says_whether_jobs_wait_for_a_replica(
    tmp_path: Path, durability: str, replicated: bool
) -> None:
    spec = load(written(tmp_path, durability), {}).services["one"]

    assert ServiceSpec.from_json(spec.to_json()).replicated is replicated


def test_the_record_of_a_service_that_does_not_wait_is_what_older_versions_wrote() -> None:
    spec = ServiceSpec(name="one", model=ModelSpec(type="echo"), model_ref="m", runtime=Runtime())

    assert "replicated" not in spec.to_json()


def test_up_starts_no_server_of_its_own_where_jobs_are_to_wait_for_a_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MILLSTREAM_REDIS_URL", raising=False)
    path = written(tmp_path, "replicated")

    ended = CliRunner().invoke(main, ["up", str(path), "--data-dir", str(tmp_path / "data")])

    assert ended.exit_code == ConfigError.exit_code
    assert "has no replicas (set redis.url" in ended.output
    assert not (tmp_path / "data").exists()
