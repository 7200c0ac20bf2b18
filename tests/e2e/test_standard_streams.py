"""The command with a standard stream that is closed, on a full disk, or in an encoding that lacks a character."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from e2e.cli_support import COMMAND, environment

CONFIG = "models: {m: {type: echo}}\nservices: {echo: {model: m}}\n"


def run(home: Path, words: str, redirected: str, **variables: str) -> tuple[int, str]:
    """The exit status and what came out of `words`, with streams redirected as the shell does it."""
    (home / "config.yaml").write_text(CONFIG)
    done = subprocess.run(
        ["bash", "-c", f"{shlex.quote(str(COMMAND))} {words} {redirected}"],
        cwd=home,
        env={**environment(home), **variables},
        capture_output=True,
        timeout=60,
        check=False,
    )
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert "Traceback" not in said
    assert "internal error" not in said
    return done.returncode, said


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_exit_status(tmp_path: Path, closed: str) -> None:
    assert run(tmp_path, "config check", closed)[0] == 0
    assert run(tmp_path, "config check no.yaml", closed)[0] == 3
    assert run(tmp_path, "queue ls --url redis://127.0.0.1:1", closed)[0] == 5


def test_a_full_disk_under_standard_output_is_said(tmp_path: Path) -> None:
    code, said = run(tmp_path, "config check", ">/dev/full")

    assert code == 1
    assert said.startswith("millstream: standard output cannot be written: No space left on device (")


def test_a_full_disk_under_standard_error_leaves_the_exit_status(tmp_path: Path) -> None:
    assert run(tmp_path, "config check no.yaml", "2>/dev/full") == (3, "")


def test_a_character_that_the_terminals_encoding_lacks_is_written_as_an_escape(tmp_path: Path) -> None:
    (tmp_path / "\u20ac.yaml").write_text(CONFIG)

    code, said = run(tmp_path, "config check \u20ac.yaml", "", PYTHONIOENCODING="latin-1", PYTHONUTF8="0")

    assert code == 0
    assert r"\u20ac.yaml: ok" in said
