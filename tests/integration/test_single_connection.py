"""A thread's own connection is kept, looked over after a pause, and opened again where it broke."""

from __future__ import annotations

import pytest
import redis

from millstream.broker.transport import link
from millstream.broker.transport.connection import Connection


@pytest.fixture
def own(connection: Connection) -> redis.Redis:
    return connection.own()


def drop(connection: Connection, own: redis.Redis) -> None:
    """Have the server close `own`'s connection."""
    assert connection.client.client_kill_filter(_id=str(own.client_id())) == 1


def test_all_commands_and_pipelines_go_over_one_connection(own: redis.Redis) -> None:
    first = own.client_id()
    pipe = own.pipeline(transaction=False)
    pipe.client_id()

    assert [own.client_id(), *pipe.execute()] == [first, first]


def test_two_threads_own_connections_differ(connection: Connection) -> None:
    assert connection.own().client_id() != connection.own().client_id()


def test_one_that_broke_in_a_pause_is_opened_anew_before_the_next_command(
    connection: Connection, own: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(connection, own)
    monkeypatch.setattr(link, "IDLE_CHECK_S", 0.0)

    assert own.ping()


def test_one_that_broke_just_now_fails_once(
    connection: Connection, own: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "IDLE_CHECK_S", 60.0)
    drop(connection, own)

    with pytest.raises(redis.ConnectionError):
        own.ping()

    assert own.ping()


def test_a_command_that_the_server_refuses_leaves_it_in_use(own: redis.Redis) -> None:
    before = own.client_id()

    with pytest.raises(redis.ResponseError):
        own.client_setname("a name with spaces")

    assert own.client_id() == before
