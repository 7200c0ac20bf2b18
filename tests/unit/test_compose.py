"""What is deployed keeps up with the code: commands and flags that exist, and times that leave room for a drain."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from millstream.broker.config.load import DEFAULT_PATH, load
from millstream.broker.config.units import seconds
from millstream.broker.contract.errors import ConfigError
from millstream.broker.transport.connection import find_url
from millstream.cli.main import exit_codes, main
from millstream.worker.supervision.supervisor import DRAIN_S

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
UNIT = "deploy/millstream-worker.service"
COMMAND = "millstream"
LONGEST_S = max(
    DRAIN_S, *(each.runtime.inference_timeout or 0.0 for each in load(ROOT / "config.yaml", {}).services.values())
)
"""How long a worker that is told to stop may take, seconds."""

# As it is where no variable is set.
_VARIABLE = re.compile(r"\$\{\w+:-([^}]*)\}")
COMPOSE: dict[str, Any] = yaml.safe_load(
    _VARIABLE.sub(r"\1", (ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name in SERVICES if "build" in SERVICES[name]]
WORKERS = [name for name in OURS if "profiles" in SERVICES[name]]


def instructions(name: str) -> list[str]:
    """What follows each `name` in the Dockerfile."""
    return re.findall(rf"^\s*{name} +(.*)$", DOCKERFILE, re.MULTILINE)


def instruction(name: str) -> str:
    """The one that counts: the last."""
    return instructions(name)[-1]


def understood(words: Sequence[str]) -> bool:
    """Whether the command line takes these words: click refuses unknown ones before it prints the help."""
    return CliRunner().invoke(main, [*words, "--help"]).exit_code == 0


def mounts(service: str) -> dict[str, str]:
    """Target -> source, and `:ro` where it is so."""
    volumes = (volume.split(":", 2) for volume in SERVICES[service]["volumes"])
    return {target: ":".join([source, *mode]) for source, target, *mode in volumes}


# -- docker-compose.yml --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", OURS)
def test_a_service_runs_a_command_that_exists(service: str) -> None:
    assert understood(SERVICES[service]["command"])


def test_each_profile_has_workers_on_its_kind_of_device() -> None:
    devices = {
        profile: words[words.index("--device") + 1]
        for name in WORKERS
        for words in [SERVICES[name]["command"]]
        for profile in SERVICES[name]["profiles"]
        if words[:2] == ["worker", "run"]
    }

    assert devices == {"cpu": "cpu", "gpu": "cuda"}


def test_a_gpu_worker_has_a_device_of_its_own() -> None:
    reserved = [
        device["device_ids"]
        for name in WORKERS
        if "gpu" in SERVICES[name]["profiles"]
        for device in SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        if device["capabilities"] == ["gpu"]
    ]

    assert [len(ids) for ids in reserved] == [1] * len(reserved)
    assert len({*map(tuple, reserved)}) == len(reserved) > 0


@pytest.mark.parametrize("service", WORKERS)
def test_a_worker_may_drain_before_it_is_killed(service: str) -> None:
    assert seconds(SERVICES[service]["stop_grace_period"]) > LONGEST_S
    assert SERVICES[service]["init"]


@pytest.mark.parametrize("service", WORKERS)
def test_a_worker_starts_when_its_services_are_published(service: str) -> None:
    assert SERVICES[service]["depends_on"] == {
        "redis": {"condition": "service_healthy"},
        "config": {"condition": "service_completed_successfully"},
    }
    assert SERVICES["config"]["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert SERVICES["config"]["command"][:2] == ["config", "push"]


@pytest.mark.parametrize("service", OURS)
def test_the_configuration_is_read_only_and_where_the_command_looks_for_it(service: str) -> None:
    assert mounts(service)[f"{instruction('WORKDIR')}/{DEFAULT_PATH}"] == "./config.yaml:ro"


def test_the_queue_is_kept_on_disk_and_never_evicted() -> None:
    words = SERVICES["redis"]["command"]
    flags = {flag: value for flag, value in pairwise(words) if flag.startswith("--")}

    assert flags["--appendonly"] == "yes"
    assert flags["--appendfsync"] == "everysec"
    assert flags["--maxmemory-policy"] == "noeviction"
    assert flags["--maxmemory"]
    assert mounts("redis")["/data"] in COMPOSE["volumes"]


def test_the_queue_is_healthy_when_it_answers_a_ping() -> None:
    assert SERVICES["redis"]["healthcheck"]["test"][-2:] == ["-e", "ping"]
    assert seconds(SERVICES["redis"]["stop_grace_period"]) > 10


def test_the_queue_is_reached_from_inside_only() -> None:
    assert [name for name in SERVICES if "ports" in SERVICES[name]] == []
    assert [COMPOSE["networks"][name] for name in SERVICES["redis"]["networks"]] == [{"internal": True}]


def test_the_queue_has_no_password_only_where_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("172.18.0.2", 0))])

    for service in OURS:
        environ = {name: str(value) for name, value in SERVICES[service]["environment"].items()}
        assert find_url(None, None, environ) == environ["MILLSTREAM_REDIS_URL"]
        with pytest.raises(ConfigError):
            find_url(None, None, {**environ, "MILLSTREAM_INSECURE": "0"})


# -- Dockerfile ----------------------------------------------------------------------------------------------------


def test_what_the_image_copies_exists_and_holds_every_package() -> None:
    copied = [path for words in instructions("COPY") if "--from" not in words for path in words.split()[:-1]]

    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert {folder.split("/")[0] for folder in PROJECT["tool"]["setuptools"]["package-dir"].values()} <= {*copied}
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"} <= {*copied}


def test_the_image_installs_extras_that_exist() -> None:
    (default,) = re.findall(r"^ARG EXTRAS=(\w+)$", DOCKERFILE, re.MULTILINE)
    chosen = {SERVICES[name]["build"]["args"]["EXTRAS"] for name in OURS}

    assert {default, *chosen} <= PROJECT["project"]["optional-dependencies"].keys()
    assert "[${EXTRAS}]" in DOCKERFILE


@pytest.mark.parametrize("service", OURS)
def test_build_arguments_are_declared(service: str) -> None:
    declared = {argument.split("=")[0] for argument in instructions("ARG")}

    assert SERVICES[service]["build"]["args"].keys() <= declared


def test_the_image_runs_the_command_and_not_as_root() -> None:
    assert json.loads(instruction("ENTRYPOINT")) == [COMMAND]
    assert COMMAND in PROJECT["project"]["scripts"]
    assert understood(json.loads(instruction("CMD")[instruction("CMD").index("[") :]))
    assert instruction("USER") != "root"


def test_the_health_check_asks_the_command() -> None:
    asked, _, _ = instruction("HEALTHCHECK").partition("CMD ")[2].partition("|")
    command, *words = shlex.split(asked)

    assert command == COMMAND
    assert understood(words)


def test_weights_are_kept_in_a_volume() -> None:
    (cache,) = re.findall(r"HF_HOME=(\S+)", DOCKERFILE)

    assert {mounts(name)[cache] for name in WORKERS} <= COMPOSE["volumes"].keys()
    assert cache in DOCKERFILE.partition("install -d")[2].splitlines()[0], "a volume takes the folder's owner over"


# -- systemd -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, delimiters=["="], comment_prefixes=["#"])
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((ROOT / UNIT).read_text(encoding="utf-8"))
    return parser["Service"]


def test_the_unit_runs_a_command_that_exists(unit: configparser.SectionProxy) -> None:
    program, *words = shlex.split(unit["ExecStart"])

    assert Path(program).name == COMMAND
    assert understood(words)


def test_the_unit_lets_workers_drain(unit: configparser.SectionProxy) -> None:
    assert (unit["KillSignal"], unit["KillMode"]) == ("SIGTERM", "mixed")
    assert seconds(unit["TimeoutStopSec"]) > LONGEST_S


def test_the_unit_restarts_what_may_succeed_another_time(unit: configparser.SectionProxy) -> None:
    hopeless = [int(status) for status in unit["RestartPreventExitStatus"].split()]

    assert unit["Restart"] == "on-failure"
    assert {name for status in hopeless for name in exit_codes()[status]} == {
        "invalid_request",
        "input_too_long",
        "wrong usage",
        "config_error",
    }
