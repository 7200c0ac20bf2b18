"""Which server and which keys: what is explicit wins, and a foreign config.yaml does no harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from millstream.broker.contract.errors import ConfigError
from millstream.broker.target import Target, find_target

OURS = "redis: {url: redis://file:1, key_prefix: staging}"
FOREIGN = "database: {host: here}\nservices: [a, b]\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config.yaml"


def test_the_file_here_names_server_and_prefix(here: Path) -> None:
    here.write_text(OURS)

    assert find_target(None, None, {}) == Target("redis://file:1", "staging")


def test_arguments_win_over_variables_and_these_over_the_file(here: Path) -> None:
    here.write_text(OURS)
    environ = {"MILLSTREAM_REDIS_URL": "redis://environment:1"}

    assert find_target(None, None, environ) == Target("redis://environment:1", "staging")
    assert find_target("redis://flag:1", "dev", environ) == Target("redis://flag:1", "dev")


def test_a_prefix_can_come_from_the_environment_alone(here: Path) -> None:
    environ = {"MILLSTREAM_REDIS_URL": "redis://environment:1", "MILLSTREAM_REDIS__KEY_PREFIX": "blue"}

    assert find_target(None, None, environ) == Target("redis://environment:1", "blue")


def test_somebody_elses_file_is_passed_over_where_the_server_is_named(here: Path) -> None:
    for text in (FOREIGN, "- a list", "{broken", ""):
        here.write_text(text)

        assert find_target("redis://flag:1", None, {}) == Target("redis://flag:1", "ms")


def test_somebody_elses_file_is_an_error_where_it_would_have_to_name_the_server(here: Path) -> None:
    here.write_text(FOREIGN)

    with pytest.raises(ConfigError, match="database"):
        find_target(None, None, {})
