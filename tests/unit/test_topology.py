"""What a URL of many hosts names, what is wrong with it, and which password is shown: none."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.config.url import read_url, redacted
from millstream.broker.contract.errors import ConfigError
from millstream.broker.transport.connection import Connection

SECRET = "p4ss"


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("redis+cluster://one:7000,two:7001", [("one", 7000), ("two", 7001)]),
        ("redis+cluster://one", [("one", 6379)]),
        ("rediss+cluster://ann:p4ss@[::1]:7000,two/0", [("::1", 7000), ("two", 6379)]),
    ],
)
def test_a_cluster_is_named_by_any_of_its_nodes(url: str, addresses: list[tuple[str, int]]) -> None:
    place = read_url(url)

    assert (place.kind, place.addresses) == ("cluster", addresses)


@pytest.mark.parametrize(
    ("url", "master", "port"),
    [
        ("redis+sentinel://one,two:5000/mill", "mill", 26379),
        ("rediss+sentinel://ann:p4ss@one:1,two:5000/mill/3?sentinel_password=p4ss", "mill", 1),
        ("redis+sentinel://one:1,two:5000/mill?db=3", "mill", 1),
    ],
)
def test_a_master_is_named_by_its_sentinels_and_their_name_for_it(url: str, master: str, port: int) -> None:
    place = read_url(url)

    assert (place.kind, place.master) == ("sentinel", master)
    assert place.addresses == [("one", port), ("two", 5000)]


def test_each_node_is_reached_with_the_user_database_and_tls_of_the_whole() -> None:
    cluster = read_url("rediss+cluster://ann:p%40ss@one,two:2?ssl_cert_reqs=none")
    master = read_url("redis+sentinel://ann:p4ss@one/mill/3")

    assert cluster.node_url(("::1", 7000)) == "rediss://ann:p%40ss@[::1]:7000/?ssl_cert_reqs=none"
    assert master.node_url(("ten", 1)) == "redis://ann:p4ss@ten:1/3"


def test_a_sentinel_is_reached_with_a_password_of_its_own_or_none() -> None:
    open_ones = read_url("redis+sentinel://ann:p4ss@one/mill/3")
    closed = read_url("rediss+sentinel://:p4ss@one/mill?sentinel_username=eve&sentinel_password=s%26&ssl_ca_certs=/ca")

    assert open_ones.sentinel_url(("one", 26379)) == "redis://one:26379/"
    assert closed.sentinel_url(("one", 26379)) in {
        "rediss://one:26379/?ssl_ca_certs=%2Fca&username=eve&password=s%26",
        "rediss://one:26379/?ssl_ca_certs=%2Fca&password=s%26&username=eve",
    }


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis+cluster://", "hosts"),
        ("redis+cluster://one:7000,", "hosts"),
        ("redis+cluster://:p4ss@one:port", "hosts"),
        ("redis+cluster://one:0", "hosts"),
        ("redis+cluster://one/3", "database 0"),
        ("redis+cluster://one?db=3", "db cannot be set"),
        ("redis+cluster://one?ssl_ca_certs=/ca", "ssl_ca_certs cannot be set"),
        ("redis+cluster://one?sentinel_password=p4ss", "sentinel_password cannot be set"),
        ("redis+cluster://:p4/ss@one", "cannot be set|hosts|database 0"),
        ("redis+sentinel://one", "names no master"),
        ("redis+sentinel://one/0", "names no master"),
        ("redis+sentinel://one/mill/three", "names no master"),
        ("redis+sentinel://one/mill/3/4", "names no master"),
        ("redis+sentinel://one/mill?socket_timeout=60", "socket_timeout cannot be set"),
        ("unix+sentinel://one/mill", "scheme"),
    ],
)
def test_a_bad_url_of_many_hosts_is_refused_with_what_to_write(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        Connection(url)

    assert "redis+cluster://host:port" in caught.value.hint
    assert "/MASTER_NAME" in caught.value.hint
    assert SECRET not in str(caught.value)
    assert "p4/ss" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis+cluster://ann:p4ss@one:1,two:2", "redis+cluster://ann:***@one:1,two:2"),
        ("rediss+cluster://:p4,s@s@one,two", "rediss+cluster://:***@one,two"),
        (
            "redis+sentinel://:p4ss@one:1/mill/0?sentinel_username=eve&sentinel_password=p4ss",
            "redis+sentinel://:***@one:1/mill/0?sentinel_username=eve&sentinel_password=***",
        ),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


@given(st.sampled_from(["redis+cluster", "redis+sentinel", "rediss+cluster", "redis"]), st.text(max_size=40))
def test_any_text_is_a_place_or_a_problem_and_nothing_else(scheme: str, rest: str) -> None:
    with suppress(ValueError):
        place = read_url(f"{scheme}://{rest}")

        assert place.kind == "single" or place.addresses
