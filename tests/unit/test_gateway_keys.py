"""API keys: the file that names them, the commands that change it, and what a running gateway sees of changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from millstream.broker.contract.errors import ConfigError, InvalidRequest
from millstream.cli.main import main
from millstream.gateway.api.keys import RELOAD_S, Key, KeyRing, add_key, digest, new_key, read_keys, revoke_key


def key_command(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["key", *words, "--file", str(folder / "keys.jsonl")])


def make(file: Path, name: str) -> str:
    key = new_key()
    add_key(file, Key(name=name, sha256=digest(key)))
    return key


def test_a_key_is_printed_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    words = ("--tenant", "acme", "--service", "embed", "--service", "chat", "--highest-priority", "batch")
    added = key_command(tmp_path, "add", "mine", *words, "--max-concurrent", "3", "--role", "admin")

    key, text = added.stdout.strip(), (tmp_path / "keys.jsonl").read_text()
    listed = key_command(tmp_path, "ls", "--json")
    assert (added.exit_code, key[:3], key in text) == (0, "ms-", False)
    assert list(read_keys(tmp_path / "keys.jsonl")) == [digest(key)]
    assert json.loads(listed.stdout) == [
        {
            "name": "mine",
            "role": "admin",
            "tenant": "acme",
            "services": ["embed", "chat"],
            "highest_priority": "batch",
            "max_concurrent": 3,
        }
    ]
    assert "embed, chat" in key_command(tmp_path, "ls").stdout


def test_keys_are_revoked_by_name(tmp_path: Path) -> None:
    key_command(tmp_path, "add", "mine")
    key_command(tmp_path, "add", "other")

    assert key_command(tmp_path, "revoke", "mine").stdout == "mine is revoked\n"
    assert [each.name for each in read_keys(tmp_path / "keys.jsonl").values()] == ["other"]
    key_command(tmp_path, "revoke", "other")
    assert key_command(tmp_path, "ls").stdout.endswith(": no key\n")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("add", "mine"), 2, "there is a key 'mine'"),
        (("add", "a b"), 2, "not a valid key: name"),
        (("add", "new", "--tenant", "a b"), 2, "not a valid key: tenant"),
        (("add", "new", "--service", "a/b"), 2, "not a valid key: services"),
        (("revoke", "other"), 2, "no key 'other'"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    key_command(tmp_path, "add", "mine")
    before = (tmp_path / "keys.jsonl").read_text()

    result = key_command(tmp_path, *words)

    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (code, "", 1)
    assert said in result.stderr
    assert (tmp_path / "keys.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "keys.jsonl:1: not a line of JSON"),
        ('{"name": "a"}', "keys.jsonl:1: sha256"),
        (f'{{"name": "a", "sha256": "{"0" * 64}", "admin": true}}', "keys.jsonl:1: admin"),
        (f'\n{{"name": "a", "sha256": "{"0" * 64}", "role": "root"}}', "keys.jsonl:2: role"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text(text)
    file.chmod(0o600)

    with pytest.raises(ConfigError, match=said):
        read_keys(file)


def test_a_file_that_others_may_change_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    make(file, "mine")
    file.chmod(0o620)

    with pytest.raises(ConfigError, match="can be changed by other users"):
        KeyRing(file)


def test_a_ring_sees_changes_within_a_second_and_keeps_its_keys_if_the_file_breaks(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    first = make(file, "first")
    ring = KeyRing(file)
    second = make(file, "second")

    assert ring.find(first, 0.5 + RELOAD_S)
    assert ring.find(second, 10.0)
    file.write_text("{")
    assert ring.find(first, 20.0)
    file.unlink()
    assert ring.find(first, 30.0)
    make(file, "third")
    assert ring.find(first, 40.0) is None


def test_a_name_is_of_one_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    make(file, "mine")

    with pytest.raises(InvalidRequest, match="choose another name"):
        make(file, "mine")
    with pytest.raises(InvalidRequest, match="no key"):
        revoke_key(file, "other")
