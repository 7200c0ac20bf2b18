"""What the shell offers for a word, and what a wrong word is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from millstream.cli.main import COMMANDS, main

CONFIG = "models: {m: {type: echo}}\nservices: {embed: {model: m}, embed-large: {model: m}, chat: {model: m}}\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config.yaml, in which the shell is."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complete(*words: str) -> list[str]:
    """What is offered for the last of `words`."""
    *args, incomplete = words
    shell = ShellComplete(main, {}, "millstream", "_MILLSTREAM_COMPLETE")
    return [item.value for item in shell.get_completions(args, incomplete)]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["wor"], ["worker"]),
        (["worker", "dr"], ["drain"]),
        (["queue", "pause", "em"], ["embed", "embed-large"]),
        (["doctor", "chat", "embed-"], ["embed-large"]),
        (["embed", "--service", "c"], ["chat"]),
        (["queue", "ls", "--js"], ["--json"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_commands_options_and_services_are_offered(words: list[str], offered: list[str]) -> None:
    assert complete(*words) == offered


def test_all_commands_are_offered_with_their_lines_of_the_help() -> None:
    assert complete("") == sorted(COMMANDS)


@pytest.mark.parametrize("text", [None, "services: [", "services: 3", ""])
def test_without_a_config_or_with_a_wrong_one_there_are_no_services(home: Path, text: str | None) -> None:
    (home / "config.yaml").unlink()
    if text is not None:
        (home / "config.yaml").write_text(text)

    assert complete("doctor", "") == []


@pytest.mark.parametrize(("shell", "part"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "function")])
def test_each_shell_gets_its_script(shell: str, part: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell])

    assert (done.exit_code, part in done.stdout, "_MILLSTREAM_COMPLETE=" in done.stdout) == (0, True, True)


@pytest.mark.parametrize(("words", "close"), [(["queue", "lss"], "ls"), (["worker", "list"], "ls"), (["tpo"], "top")])
def test_a_command_that_does_not_exist_is_answered_with_the_closest(words: list[str], close: str) -> None:
    done = CliRunner().invoke(main, words)

    assert (done.exit_code, done.stdout, f"did you mean {close}?" in done.stderr) == (2, "", True)


def test_an_option_that_does_not_exist_is_answered_with_the_closest() -> None:
    done = CliRunner().invoke(main, ["queue", "ls", "--jsn"])

    assert (done.exit_code, "--json" in done.stderr) == (2, True)
