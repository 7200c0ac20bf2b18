"""The section `pools` of config.yaml: what it may say, and which processes it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from millstream.broker.config.load import Config, load
from millstream.broker.contract.errors import ConfigError
from millstream.cli.main import main
from millstream.worker.supervision.child_args import ChildArgs
from millstream.worker.supervision.plan import plans_of

FILE = """\
models:
  e: {type: echo, keep: true}
  up: {type: embedding, model_name: m, backend: tei, url: "http://localhost:8080"}
services:
  one: {model: e, runtime: {target: 300ms}}
  two: {model: e}
  three: {model: e, runtime: {worker_count: 3}}
  far: {model: up}
pools:
  gpu0: %s
"""


def read(tmp_path: Path, pool: str) -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(FILE % pool)
    return load(file, {})


def test_a_pool_gives_its_processes_and_the_other_services_have_their_own(tmp_path: Path) -> None:
    config = read(tmp_path, "{device: 'cuda:0', services: [two, one], memory: 20GB, workers: 2, min_residence: 4s}")

    pool, *others = plans_of(config, "/folder")

    assert [spec.name for spec in pool.specs] == ["two", "one"]
    assert (pool.count, pool.device, pool.folder) == (2, "cuda:0", "/folder")
    assert pool.pool is not None
    assert (pool.pool.name, pool.pool.memory, pool.pool.residence_s) == ("gpu0", 20_000_000_000, 4.0)
    assert [(plan.spec.name, plan.pool) for plan in others] == [("three", None), ("far", None)]
    assert others[0].count == 3
    assert pool.specs[1].runtime.target == 0.3
    assert pool.specs[0].model.keep


def test_the_arguments_of_a_process_keep_its_pool(tmp_path: Path) -> None:
    (pool, *_) = plans_of(read(tmp_path, "{device: cpu, services: [one]}"), "")
    args = ChildArgs([], "ms", "w", "cpu", 1, pool=pool.pool)

    assert ChildArgs.from_json(args.to_json()) == args
    assert args.pool is not None
    assert args.pool.memory is None


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        ("{services: [one]}", "device: missing; name the device, as in cuda:0 or cpu"),
        ("{device: cpu}", "services: missing; name the services whose models the pool loads"),
        ("{device: cpu, services: []}", "services: empty; name the services"),
        ("{device: cpu, services: [onn]}", "services: no service named onn; did you mean one?"),
        ("{device: cpu, services: [one, one]}", "services: one is twice; name it once"),
        ("{device: cpu, services: [one]}\n  b: {device: cpu, services: [one]}", "services: one is in pool gpu0, too"),
        ("{device: cpu, services: [far]}", "services: far runs on a server, so it has no model to load"),
        ("{device: cpu, services: [one], memory: lots}", "memory: must be bytes"),
        ("{device: cpu, services: [one], workers: 0}", "workers: must be at least 1"),
        ("{device: cpu, services: [one], keep: true}", "keep: unknown key; known are: device, services, memory"),
    ],
)
def test_a_mistake_in_a_pool_says_how_to_mend_it(tmp_path: Path, pool: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, pool)

    assert reason in str(caught.value)


def test_worker_run_refuses_a_pool_that_is_not_there_and_one_beside_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(tmp_path, "{device: cpu, services: [one]}")
    monkeypatch.chdir(tmp_path)

    missing = CliRunner().invoke(main, ["worker", "run", "--pool", "gpu1"])
    beside = CliRunner().invoke(main, ["worker", "run", "--pool", "gpu0", "one"])

    assert (missing.exit_code, "known are: gpu0" in missing.stderr) == (3, True), missing.stderr
    assert beside.exit_code == 2
    assert "--pool names services, device and processes" in beside.stderr
