"""What `millstream dashboard` refuses before it serves, and the lines that it writes for its users."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from millstream.cli.main import main
from millstream.gateway.dashboard.users import read_users

URL = "redis://127.0.0.1:1"


def test_a_new_users_line_can_be_used(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["dashboard", "--new-user", "ada:operator"], input="correct horse\n")

    file = tmp_path / "users"
    file.write_text(result.stdout)
    file.chmod(0o600)
    assert result.exit_code == 0
    assert "correct horse" not in result.output
    assert read_users(file)["ada"].has_password("correct horse")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--new-user", "ada:admin"], 2, "'admin' is no role"),
        (["--new-user", "ada"], 2, "is no name of a user"),
        (["--host", "0.0.0.0"], 3, "without passwords"),
        (["--password-file", "none"], 3, "the password file none cannot be read"),
        (["--root-path", "services"], 3, "--root-path 'services' cannot be used"),
        (["--host", "256.0.0.1", "--password-file", "users"], 3, "cannot listen on 256.0.0.1"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = CliRunner().invoke(main, ["dashboard", "--new-user", "ada:viewer"], input="just looking\n").stdout
    (tmp_path / "users").write_text(line)
    (tmp_path / "users").chmod(0o600)

    result = CliRunner().invoke(main, ["dashboard", "--url", URL, *words], input="just looking\n")

    assert (result.exit_code, len(result.stderr.splitlines()), result.stdout) == (code, 1, "")
    assert said in result.stderr


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def without_uvicorn(name: str) -> object:
        if name == "uvicorn":
            raise ModuleNotFoundError("No module named 'uvicorn'")
        return original(name)

    monkeypatch.setattr(importlib, "import_module", without_uvicorn)

    result = CliRunner().invoke(main, ["dashboard", "--url", URL])

    assert result.exit_code == 3
    assert 'pip install "millstream[dashboard]"' in result.stderr
