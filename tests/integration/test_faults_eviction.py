"""A server that deletes keys when its memory is full is refused by all who would give jobs to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import engines
import pytest
from e2e.cli_support import Shell

from millstream.broker.config.load import Config
from millstream.broker.config.spec import RedisSettings
from millstream.broker.contract.errors import ConfigError
from millstream.broker.transport.connection import Connection, check
from millstream.broker.transport.eviction import allowed
from millstream.worker.serving import serve

FULL = ("--maxmemory", "64mb", "--maxmemory-policy")
FILE = "models: {m: {type: echo}}\nservices: {echo: {model: m}}\n"


@pytest.fixture(params=["valkey9", "redis62"])
def binary(request: pytest.FixtureRequest) -> Path:
    return engines.binary_of(request.param)


@contextmanager
def evicting(binary: Path, home: Path, *flags: str) -> Iterator[Connection]:
    with engines.serving(binary, home, *flags) as port:
        connection = Connection(f"redis://127.0.0.1:{port}", name="tests")
        yield connection
        connection.close()


@pytest.mark.parametrize(
    ("policy", "victims"),
    [
        ("allkeys-lru", "accepted jobs"),
        ("allkeys-random", "accepted jobs"),
        ("volatile-lru", "answers before they are read"),
        ("volatile-ttl", "answers before they are read"),
    ],
)
def test_a_policy_that_deletes_is_refused_with_the_command_that_fixes_it(
    tmp_path: Path, binary: Path, policy: str, victims: str
) -> None:
    with evicting(binary, tmp_path, *FULL, policy) as connection:
        with pytest.raises(ConfigError, match=f"maxmemory-policy {policy}: .* deletes {victims}") as caught:
            check(connection)

        port = connection.url.rpartition(":")[2]
        fix = f"redis-cli -h 127.0.0.1 -p {port} CONFIG SET maxmemory-policy noeviction"
        assert f"`{fix}`" in caught.value.hint
        connection.client.config_set(*fix.split()[7:])
        check(connection)


def test_where_that_is_allowed_it_is_a_warning(tmp_path: Path, binary: Path, caplog: pytest.LogCaptureFixture) -> None:
    with evicting(binary, tmp_path, *FULL, "allkeys-lfu") as connection, caplog.at_level(logging.WARNING):
        check(connection, allow_eviction=True)

    assert "deletes accepted jobs; that is allowed here" in caplog.text


def test_without_a_maxmemory_nothing_is_deleted_and_a_warning_is_all(
    tmp_path: Path, binary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        evicting(binary, tmp_path, "--maxmemory-policy", "allkeys-lru") as connection,
        caplog.at_level(logging.WARNING),
    ):
        check(connection)

    assert "it has no maxmemory now" in caplog.text
    assert "CONFIG SET maxmemory-policy noeviction" in caplog.text


def test_a_server_that_keeps_everything_is_taken_without_a_word(
    tmp_path: Path, binary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with evicting(binary, tmp_path, *FULL, "noeviction") as connection, caplog.at_level(logging.WARNING):
        check(connection)

    assert caplog.text == ""


@pytest.mark.parametrize("info", ["cut short", "whole"])
def test_a_server_that_forbids_config_says_it_by_info_or_there_is_a_warning(
    tmp_path: Path, binary: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, info: str
) -> None:
    with evicting(binary, tmp_path, "--rename-command", "CONFIG", "") as connection, caplog.at_level(logging.WARNING):
        if info == "cut short":
            whole = connection.client.info
            monkeypatch.setattr(
                connection.client, "info", lambda section: {} if section == "memory" else whole(section)
            )
        check(connection)

    assert ("does not say its maxmemory-policy" in caplog.text) is (info == "cut short")


@pytest.mark.parametrize(
    ("variable", "setting", "is_allowed"),
    [("1", False, True), ("", True, True), ("0", False, False), ("", False, False)],
)
def test_the_environment_or_the_file_allows_it(variable: str, setting: bool, is_allowed: bool) -> None:
    config = Config(models={}, services={}, redis=RedisSettings(allow_eviction=setting))

    assert allowed(config, {"MILLSTREAM_ALLOW_EVICTION": variable}) is is_allowed


Start = Callable[[str], None]


@pytest.mark.parametrize("words", [("up",), ("config", "push"), ("worker", "run")])
def test_no_command_gives_it_jobs(tmp_path: Path, wheel_binary: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "config.yaml").write_text(FILE)
    with evicting(wheel_binary, tmp_path, *FULL, "allkeys-lru") as connection:
        ended = Shell(tmp_path, connection.url).run(*words)

        assert ended.code == 3
        assert "maxmemory-policy allkeys-lru" in ended.err
        assert "noeviction" in ended.err
        assert not connection.client.keys("*")

        if words == ("config", "push"):
            forced = Shell(tmp_path, connection.url).run(*words, "--allow-eviction")
            assert (forced.code, forced.out) == (0, b"echo: published\n")


def test_no_program_serves_there(tmp_path: Path, wheel_binary: Path) -> None:
    with evicting(wheel_binary, tmp_path, *FULL, "allkeys-lru") as connection:
        with pytest.raises(ConfigError, match="maxmemory-policy allkeys-lru"):
            serve(lambda payloads: payloads, "doubled", url=connection.url, prefix="ms")

        assert not connection.client.keys("*")
