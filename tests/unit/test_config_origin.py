"""`config show`: what a file comes to, and where each value came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner
from configs import USERS_FILE

from millstream.broker.config.load import load
from millstream.broker.config.origin import resolved
from millstream.cli.main import main

FILE = """\
models:
  m: {type: embedding, model_name: some/model}
services:
  embed:
    model: m
    runtime: {preset: latency, batch_timeout: 20ms, rate_limit: 5, priorities: {batch: {share: 0.5}}}
"""

Origins = Callable[..., Mapping[str, tuple[object, str]]]


@pytest.fixture
def origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Origins:
    """Dotted key -> its value and where that came from."""
    monkeypatch.chdir(tmp_path)

    def of(text: str = FILE, **environ: str) -> Mapping[str, tuple[object, str]]:
        Path("config.yaml").write_text(text)
        return {".".join(each.path): (each.value, each.origin) for each in resolved(load(environ=environ), environ)}

    return of


def shown(*words: str) -> list[str]:
    result = CliRunner().invoke(main, ["config", "show", *words])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_a_value_comes_from_a_variable_a_line_a_preset_its_type_or_the_default(origins: Origins) -> None:
    found = origins(MILLSTREAM_SERVICES__EMBED__RUNTIME__MAX_ATTEMPTS="7")

    runtime = {key.rpartition(".")[2]: value for key, value in found.items() if key.startswith("services.embed.")}
    assert runtime["max_attempts"] == (7, "MILLSTREAM_SERVICES__EMBED__RUNTIME__MAX_ATTEMPTS")
    assert runtime["batch_timeout"] == (0.02, "config.yaml:6")
    assert runtime["batch_size"] == (8, "preset latency")
    assert runtime["worker_count"] == (2, "default of type embedding")
    assert runtime["truncate"] == ("none", "default")
    assert found["services.embed.model"] == ("m", "config.yaml:5")
    assert found["models.m.dtype"] == ("float32", "default")
    assert found["redis.key_prefix"] == ("ms", "default")


def test_of_a_mapping_only_what_is_set_is_shown_with_the_line_it_came_from(origins: Origins) -> None:
    found = origins()

    below = {key: value for key, value in found.items() if "rate_limit" in key or "priorities" in key}
    assert below == {
        "services.embed.runtime.rate_limit.requests": (5.0, "config.yaml:6"),
        "services.embed.runtime.priorities.batch.share": (0.5, "config.yaml:6"),
    }
    assert origins("models: {m: {type: llm, model_name: x}}\nservices: {s: {model: m}}")[
        "services.s.runtime.rate_limit.requests"
    ] == (10.0, "default of type llm")


def test_the_variables_that_commands_read_themselves_are_shown_too(origins: Origins) -> None:
    file = f"{FILE}redis: {{url: 'redis://file', data_dir: /file}}\n"

    assert origins(file)["redis.url"] == ("redis://file", "config.yaml:7")
    found = origins(file, MILLSTREAM_REDIS_URL="redis://variable", MILLSTREAM_DATA_DIR="/variable")
    assert found["redis.url"] == ("redis://variable", "MILLSTREAM_REDIS_URL")
    assert found["redis.data_dir"] == ("/variable", "MILLSTREAM_DATA_DIR")


@pytest.mark.parametrize(
    "text",
    [FILE, USERS_FILE, "models: {'no': {type: echo, model_name: \"a\\nb: #\\u00e9\", devices: [cpu, 'cuda:1']}}"],
)
def test_what_is_shown_is_a_configuration_that_comes_to_the_same(origins: Origins, text: str) -> None:
    origins(f"{text}\nredis: {{data_dir: /data}}\n")
    before = load(environ={})

    Path("shown.yaml").write_text("\n".join(shown("config.yaml", "--origin")))

    after = load("shown.yaml", {})
    assert (after.models, after.services, after.redis) == (before.models, before.services, before.redis)


def test_the_origins_stand_beside_the_values(origins: Origins) -> None:
    origins()

    plain, with_origin = shown(), shown("--origin")

    assert "    type: embedding" in plain
    assert any(re.fullmatch(r" {6}batch_size: 8 +# preset latency", line) for line in with_origin)
    assert [line.partition("#")[0].rstrip() for line in with_origin] == plain


def test_a_password_is_not_shown(origins: Origins) -> None:
    origins(f"{FILE}redis: {{url: 'redis://user:secret@host:1'}}\n")

    assert "  url: redis://user:***@host:1" in shown()


def test_what_is_wrong_with_a_file_is_said_as_everywhere(origins: Origins) -> None:
    origins()
    Path("config.yaml").write_text("models: {m: {type: eco}}")

    result = CliRunner().invoke(main, ["config", "show"])

    assert (result.exit_code, result.stdout) == (3, "")
    assert "did you mean echo?" in result.stderr
