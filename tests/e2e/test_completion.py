"""The shell completes commands, options and services, by the script that `millstream completion` prints."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from e2e.cli_support import COMMAND, environment

CONFIG = "models: {m: {type: echo}}\nservices: {embed: {model: m}, embed-large: {model: m}, chat: {model: m}}\n"

ASK = """
eval "$("$1" completion bash)" || exit 1
shift
COMP_WORDS=(millstream "$@") COMP_CWORD=$# COMPREPLY=()
_millstream_completion millstream
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def complete(home: Path, words: Sequence[str]) -> list[str]:
    """What bash offers for the last of `words`."""
    path = f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", str(COMMAND), *words],
        cwd=home,
        env={**environment(home), "PATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["wor"], ["worker"]),
        (["worker", "dr"], ["drain"]),
        (["queue", "pause", "em"], ["embed", "embed-large"]),
        (["queue", "ls", "--js"], ["--json"]),
    ],
)
def test_bash_completes_commands_options_and_services(home: Path, words: list[str], offered: list[str]) -> None:
    assert complete(home, words) == offered


def test_without_a_config_there_are_no_services_and_no_message(tmp_path: Path) -> None:
    assert complete(tmp_path, ["doctor", ""]) == []


@pytest.mark.parametrize(("shell", "first"), [("zsh", "#compdef millstream"), ("fish", "function _millstream")])
def test_other_shells_get_their_script(home: Path, shell: str, first: str) -> None:
    done = subprocess.run([COMMAND, "completion", shell], cwd=home, capture_output=True, text=True, check=True)

    assert done.stdout.startswith(first)


@pytest.mark.parametrize(("words", "close"), [(["queue", "lss"], "ls"), (["worker", "list"], "ls"), (["tpo"], "top")])
def test_a_command_that_does_not_exist_is_answered_with_the_closest(home: Path, words: list[str], close: str) -> None:
    done = subprocess.run([COMMAND, *words], cwd=home, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (2, "")
    assert f"did you mean {close}?" in done.stderr


def test_an_option_that_does_not_exist_is_answered_with_the_closest(home: Path) -> None:
    done = subprocess.run([COMMAND, "queue", "ls", "--jsn"], cwd=home, capture_output=True, text=True, check=False)

    assert (done.returncode, "--json" in done.stderr) == (2, True)
