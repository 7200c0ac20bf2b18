"""`millstream config`, and what every command does with errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner, Result

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import BrokerUnavailable, ConfigError, MillstreamError, UnknownService
from millstream.cli.main import COMMANDS, Lazy, LazyGroup, exit_codes, main

FILE = """\
models:
  m: {type: embedding, model_name: some/model}
  e: {type: echo}
services:
  embed: {model: m, runtime: {batch_timeout: 1.5s, total_timeout: none}}
  echo: {model: e}
"""

Fail = Callable[[Callable[[], object]], Result]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Runs a subcommand whose body is the function given."""

    def run_body(body: Callable[[], object]) -> Result:
        module = ModuleType("stand_in")
        module.__dict__["command"] = click.Command("stand-in", callback=body)
        monkeypatch.setitem(sys.modules, "stand_in", module)
        monkeypatch.setattr(LazyGroup, "commands_by_name", {"stand-in": Lazy("stand_in:command", "")})
        return run("stand-in")

    return run_body


def raising(error: BaseException) -> Callable[[], object]:
    def body() -> None:
        raise error

    return body


def test_check_shows_each_service_with_its_resolved_values(file: Path) -> None:
    result = run("config", "check", file)

    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "SERVICE  MODEL  TYPE       ROWS  TOKENS  WAIT  WORKERS  QUEUE  TIMEOUT",
        "embed    m      embedding  64    2048    1.5s  2        10000  none",
        "echo     e      echo       32    2048    10ms  1        10000  60s",
        f"{file}: ok, 2 services",
    ]


def test_check_reads_config_yaml_of_the_working_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)

    assert run("config", "check").stdout.splitlines()[-1] == "config.yaml: ok, 2 services"


def test_check_warns_of_what_is_not_enforced_on_stderr(file: Path) -> None:
    file.write_text(FILE.replace("type: echo", "type: echo, warmup: false"))

    result = run("config", "check", file)

    assert result.exit_code == 0
    assert result.stderr == f"warning: warmup is accepted, but not enforced yet ({file}:3 e)\n"


def test_check_prints_every_error_on_stderr_and_exits_3(file: Path) -> None:
    file.write_text(FILE.replace("batch_timeout", "batch_timeot").replace("model: e", "model: x"))

    result = run("config", "check", file)

    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.splitlines() == [
        f"millstream: {file}:5: services.embed.runtime.batch_timeot: unknown key; did you mean batch_timeout?",
        f"millstream: {file}:6: services.echo.model: no model named x; known are: m, e",
    ]


@pytest.fixture
def pushes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, list[str], bool]]:
    """What was pushed: URL, prefix, services, replace. The stand-in server changes the first service only."""
    pushed: list[tuple[str, str, list[str], bool]] = []

    class FakeConnection:
        def __init__(self, url: str) -> None:
            self.url = url

        def close(self) -> None:
            pass

    class FakeRegistry:
        def __init__(self, connection: FakeConnection, prefix: str) -> None:
            self.where = (connection.url, prefix)

        def push(self, specs: Iterable[ServiceSpec], replace: bool = False) -> list[str]:
            names = [spec.name for spec in specs]
            pushed.append((*self.where, names, replace))
            return names[:1]

    monkeypatch.setattr("millstream.broker.transport.connection.Connection", FakeConnection)
    monkeypatch.setattr("millstream.broker.transport.connection.check", lambda connection, allow_eviction: None)
    monkeypatch.setattr("millstream.broker.queue.registry.Registry", FakeRegistry)
    monkeypatch.delenv("MILLSTREAM_REDIS_URL", raising=False)
    return pushed


def test_push_publishes_the_services_and_names_those_that_changed(
    file: Path, pushes: list[tuple[str, str, list[str], bool]]
) -> None:
    file.write_text(FILE + "redis: {url: 'redis://configured', key_prefix: mill}\n")

    results = [run("config", "push", file), run("config", "push", file, "--url", "redis://flag", "--replace")]

    assert [result.exit_code for result in results] == [0, 0]
    assert [result.stdout for result in results] == ["embed: published\n"] * 2
    assert pushes == [
        ("redis://configured", "mill", ["embed", "echo"], False),
        ("redis://flag", "mill", ["embed", "echo"], True),
    ]


def test_push_of_a_wrong_file_pushes_nothing(file: Path, pushes: list[tuple[str, str, list[str], bool]]) -> None:
    file.write_text("services: {a: {model: b}}")

    assert run("config", "push", file).exit_code == 3
    assert pushes == []


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BrokerUnavailable("no server", hint="start one"), 5, "millstream: no server (start one)\n"),
        (UnknownService("no service x"), 4, "millstream: no service x\n"),
        (ConfigError("a: 1\nb: 2"), 3, "millstream: a: 1\nmillstream: b: 2\n"),
        (
            ZeroDivisionError("by\nzero"),
            70,
            "millstream: internal error: ZeroDivisionError: by zero; run with MILLSTREAM_DEBUG=1 for the traceback\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_an_error_is_one_line_on_stderr_and_an_exit_code(
    running: Fail, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    monkeypatch.delenv("MILLSTREAM_DEBUG", raising=False)

    result = running(raising(error))

    assert (result.exit_code, result.stdout, result.stderr) == (code, "", said)


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), UnknownService("no service x")])
def test_the_traceback_is_shown_when_asked_for(
    running: Fail, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("MILLSTREAM_DEBUG", "1")

    assert "Traceback (most recent call last):" in running(raising(error)).stderr


def test_an_unknown_command_or_option_is_wrong_usage() -> None:
    assert run("config", "check", "--colour").exit_code == 2
    assert run("nonsense").exit_code == 2
    assert (run("confg").exit_code, "did you mean config?" in run("confg").stderr) == (2, True)


def test_help_lists_every_command_and_exit_code_without_importing_commands() -> None:
    result = run("--help")

    assert result.exit_code == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    assert all(f" {code}  {', '.join(names)}\n" in result.stdout for code, names in exit_codes().items())
    assert exit_codes()[3] == [ConfigError.code]
    assert MillstreamError.code in exit_codes()[1]


def test_the_lines_of_help_agree_with_the_commands() -> None:
    assert run("config", "--help").stdout.splitlines()[2].strip() == COMMANDS["config"].help


def test_help_imports_neither_redis_nor_a_model_library() -> None:
    code = (
        "import sys; from millstream.cli.main import main; main(['--help'], standalone_mode=False); "
        "print('imported:', [m for m in ('redis', 'numpy', 'torch', 'pydantic', 'yaml') if m in sys.modules])"
    )

    answer = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.splitlines()[-1] == "imported: []"
    assert run("--version").stdout.startswith("millstream ")


def test_no_command_imports_a_model_library_and_config_no_redis() -> None:
    code = (
        "import sys, click; from millstream.cli.main import COMMANDS, main; c = click.Context(main); "
        "main.get_command(c, 'config'); print('config:', 'redis' in sys.modules); "
        "[main.get_command(c, name) for name in COMMANDS]; "
        "print('all:', [m for m in ('torch', 'transformers', 'sentence_transformers') if m in sys.modules])"
    )

    answer = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.splitlines() == ["config: False", "all: []"]


WRITES_UNFLUSHED = """
import sys, types, click
from millstream.cli.main import Lazy, LazyGroup, main
sys.modules["stand_in"] = module = types.ModuleType("stand_in")
module.command = click.Command("stand-in", callback=lambda: sys.stdout.write("text"))
LazyGroup.commands_by_name = {"stand-in": Lazy("stand_in:command", "")}
main(["stand-in"])
"""


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)

    try:
        command = [sys.executable, "-P", "-c", WRITES_UNFLUSHED]
        answer = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    finally:
        os.close(writing)

    assert (answer.returncode, answer.stderr) == (1, "")
