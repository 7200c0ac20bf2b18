"""A Redis URL is read in every usual spelling, and one that names no server is refused with the reason."""

from __future__ import annotations

import pytest

from millstream.broker.config.load import load
from millstream.broker.config.url import canonical, read_url
from millstream.broker.contract.errors import ConfigError
from millstream.broker.transport.connection import Connection, find_url


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("REDIS://127.0.0.1:1", "redis://127.0.0.1:1"),
        ("  redis://127.0.0.1:1\n", "redis://127.0.0.1:1"),
        ("unix:/run/redis.sock", "unix:///run/redis.sock"),
        ("UNIX:///run/Redis.sock?db=1", "unix:///run/Redis.sock?db=1"),
        ("Redis+Cluster://one:1 , two:2", "redis+cluster://one:1,two:2"),
        ("redis://:p$4ss@host:1/0", "redis://:p$4ss@host:1/0"),
    ],
)
def test_every_usual_spelling_names_the_same_server(written: str, meant: str) -> None:
    assert canonical(written) == meant
    assert read_url(written).url == meant
    assert Connection(written).url == meant
    assert find_url(None, None, {"MILLSTREAM_REDIS_URL": written, "MILLSTREAM_INSECURE": "1"}) == meant


BAD = [
    ("", "empty"),
    ("${REDIS_URL}", r"it contains \$\{REDIS_URL\},"),
    ("$REDIS_URL", r"it contains \$REDIS_URL,"),
    ("redis://$HOST:6379", r"it contains \$HOST,"),
    ("redis://:${PASSWORD}@host", r"it contains \$\{PASSWORD\},"),
    ("{{ redis_url }}", "it contains a variable,"),
    ("localhost:6379", "scheme is not known"),
    ("redis:localhost", "no :// follows the scheme"),
    ("redis://", "names no host"),
    ("redis:///0", "names no host"),
    ("redis://host:99999", "port is not a number"),
    ("redis://host:0", "port is not a number"),
    ("redis://host:port", "port is not a number"),
    ("redis://a..b", "not a valid name"),
    ("redis+cluster://one,a..b", "not a valid name"),
    ("redis://my host", "space"),
    ("redis://host/two", "database is not a number"),
    ("redis://host/-1", "database is not a number"),
    ("unix:///run/a.sock?db=x", "database is not a number"),
    ("unix:///run/a%00.sock", "control character"),
    ("unix:relative.sock", "no :// follows the scheme"),
    ("unix://relative.sock", "no absolute socket path"),
    ("redis://:p#ss@host", "port is not a number|has a #"),
    ("rediss://host?ssl_cert_reqs=maybe", "ssl_cert_reqs must be one of"),
]


@pytest.mark.parametrize(("url", "reason"), BAD)
def test_what_names_no_server_is_refused_with_the_reason_and_the_forms(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        Connection(url)

    assert "redis://host:port/db" in caught.value.hint


@pytest.mark.parametrize(("url", "reason"), [each for each in BAD if each[0]])
def test_the_url_of_a_configuration_is_checked_with_the_rest_of_it(
    tmp_path_factory: pytest.TempPathFactory, url: str, reason: str
) -> None:
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(f"models: {{m: {{type: echo}}}}\nservices: {{s: {{model: m}}}}\nredis: {{url: '{url}'}}\n")

    with pytest.raises(ConfigError, match=f"config.yaml:3: redis.url: .*({reason})"):
        load(file, {})


def test_a_password_in_a_bad_url_of_a_configuration_is_not_shown(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text("redis: {url: 'redis://ann:p4ss@host:port'}\n")

    with pytest.raises(ConfigError) as caught:
        load(file, {})

    assert "p4ss" not in str(caught.value)
