"""Passwords come from files, and a server on another host is not used by everybody who happens to reach it."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from millstream.broker.config.load import Config, RedisSettings
from millstream.broker.contract.errors import ConfigError
from millstream.broker.transport.access import FilePassword, open_host, read_password, secured, split_password_file
from millstream.broker.transport.connection import Connection, find_url

ELSEWHERE = "192.0.2.1"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that holds p4ss, as few may read it as should."""
    file = tmp_path / "secret"
    file.write_text("p4ss\n")
    file.chmod(0o600)
    return file


def config(**redis: Any) -> Config:
    return Config(models={}, services={}, redis=RedisSettings(**redis))


# -- a password in a file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "bare", "credentials"),
    [
        ("redis://host:1/2", "redis://host:1/2", ("p4ss",)),
        ("redis://ann@host:1/2", "redis://host:1/2", ("ann", "p4ss")),
        ("rediss://a%40b@host:1?ssl_ca_certs=/ca.pem", "rediss://host:1?ssl_ca_certs=%2Fca.pem", ("a@b", "p4ss")),
        ("unix:///run/a.sock?db=1", "unix:///run/a.sock?db=1", ("p4ss",)),
        ("redis+cluster://ann@a:1,b:2", "redis+cluster://a:1,b:2", ("ann", "p4ss")),
    ],
)
def test_the_library_gets_the_url_without_user_and_file(
    secret: Path, url: str, bare: str, credentials: tuple[str, ...]
) -> None:
    named = secured(url, config(password_file=secret), {})

    url_for_the_library, password = split_password_file(named)

    assert "p4ss" not in named
    assert url_for_the_library == bare
    assert password is not None
    assert password.get_credentials() == credentials
    assert "p4ss" not in repr(password)


def test_the_environment_names_another_file_than_the_configuration(secret: Path, tmp_path: Path) -> None:
    environ = {"MILLSTREAM_REDIS_PASSWORD_FILE": os.fspath(secret), "MILLSTREAM_REDIS_URL": "redis://localhost:1"}

    url = find_url(None, config(password_file=tmp_path / "other"), environ)

    assert str(secret) in url
    assert "other" not in url


def test_a_url_with_a_password_of_its_own_keeps_it(secret: Path) -> None:
    for url in ("redis://:own@localhost:1", "unix:///run/a.sock?password=own", "redis://h?password_file=/own"):
        assert secured(url, config(password_file=secret), {}) == url


def test_a_changed_password_is_used_at_the_next_connection(secret: Path) -> None:
    password = FilePassword("", secret)

    secret.write_text("n3w")
    assert password.get_credentials() == ("n3w",)
    secret.unlink()
    assert password.get_credentials() == ("n3w",)


@pytest.mark.parametrize("fault", ["missing", "empty", "a folder", "no text", "a blank first line"])
def test_a_password_file_that_cannot_be_used_is_named(tmp_path: Path, fault: str) -> None:
    file = tmp_path / "secret"
    match fault:
        case "empty":
            file.touch()
        case "a folder":
            file.mkdir()
        case "no text":
            file.write_bytes(b"\xff\xfe")
        case "a blank first line":
            file.write_text("\np4ss")

    with pytest.raises(ConfigError, match="secret"):
        Connection(f"redis://localhost:1?password_file={file}")


def test_a_password_twice_is_an_error(secret: Path) -> None:
    with pytest.raises(ConfigError, match="and a password file") as caught:
        Connection(f"redis://:0wn@localhost:1?password_file={secret}")

    assert "0wn" not in str(caught.value)


def test_a_file_that_everybody_may_read_is_complained_of_once(secret: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_password(secret)
        assert caplog.messages == []
        secret.chmod(0o604)
        for _ in range(2):
            read_password(secret)

    assert len(caplog.messages) == 1
    assert str(secret) in caplog.messages[0]
    assert "chmod" in caplog.messages[0]


# -- open servers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"redis://{ELSEWHERE}:6379/0",
        f"redis://ann@{ELSEWHERE}",
        "redis://[2001:db8::1]:6379",
        f"redis+cluster://localhost:1,{ELSEWHERE}:2",
        f"redis+sentinel://127.0.0.1:1,{ELSEWHERE}:2/mill",
    ],
)
def test_a_server_on_another_host_that_is_open_to_everybody_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="without TLS and without a password") as caught:
        find_url(url, None, {})

    for way in ("millstream acl", "password_file", "rediss://", "MILLSTREAM_INSECURE=1"):
        assert way in caught.value.hint


def test_it_is_refused_wherever_it_was_named() -> None:
    url = f"redis://{ELSEWHERE}"

    with pytest.raises(ConfigError):
        find_url(None, None, {"MILLSTREAM_REDIS_URL": url})
    with pytest.raises(ConfigError):
        find_url(None, config(url=url), {})


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:6379",
        "redis://127.0.0.2",
        "redis://[::1]:6379",
        "unix:///run/redis.sock",
        f"rediss://{ELSEWHERE}",
        f"redis://:p4ss@{ELSEWHERE}",
        f"redis://ann:p4ss@{ELSEWHERE}",
        f"redis://{ELSEWHERE}?password=p4ss",
        f"redis://{ELSEWHERE}?password_file=/run/secrets/redis",
        f"rediss+cluster://{ELSEWHERE}:1,{ELSEWHERE}:2",
        "redis+cluster://localhost:1,127.0.0.1:2",
    ],
)
def test_this_host_a_password_or_tls_is_safe(url: str) -> None:
    assert find_url(url, None, {}) == url


def test_whoever_is_in_charge_may_force_it() -> None:
    url = f"redis://{ELSEWHERE}"

    assert find_url(url, None, {"MILLSTREAM_INSECURE": "1"}) == url
    assert find_url(url, config(insecure=True), {}) == url
    with pytest.raises(ConfigError):
        find_url(url, config(insecure=False), {"MILLSTREAM_INSECURE": "0"})


def test_a_name_counts_for_what_it_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"here": ["127.0.0.1", "::1"], "there": [ELSEWHERE], "both": ["127.0.0.1", ELSEWHERE]}

    def resolve(host: str, *_: object, **__: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        if host not in known:
            raise socket.gaierror
        return [(0, 0, 0, "", (address, 0)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    assert [open_host(f"redis://{host}:1") for host in ("here", "there", "both")] == ["", "there", "both"]
    # To connect to it fails, and says why.
    assert open_host("redis://nobody") == ""
