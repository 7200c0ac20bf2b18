"""What `millstream serve` refuses before it serves."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from millstream.cli.main import main

URL = "redis://127.0.0.1:1"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--host", "0.0.0.0"], 3, "without keys"),
        (["--keys", "none.jsonl"], 3, "the file of keys none.jsonl cannot be read"),
        (["--keys", "none.jsonl", "--processes", "2"], 3, "the file of keys none.jsonl cannot be read"),
        (["--host", "256.0.0.1", "--keys", "keys.jsonl"], 3, "cannot listen on 256.0.0.1"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(main, ["key", "add", "mine"])

    result = CliRunner().invoke(main, ["serve", "--url", URL, "--port", "0", *words])

    assert (result.exit_code, said in result.stderr) == (code, True)
    assert len(result.stderr.splitlines()) == 1


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def without_orjson(name: str) -> object:
        if name == "orjson":
            raise ModuleNotFoundError("No module named 'orjson'")
        return original(name)

    monkeypatch.setattr(importlib, "import_module", without_orjson)

    result = CliRunner().invoke(main, ["serve", "--url", URL])

    assert result.exit_code == 3
    assert 'pip install "millstream[gateway]"' in result.stderr
