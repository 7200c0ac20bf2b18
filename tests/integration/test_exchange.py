"""Commands go out in one piece, each has its answer or its error, and no answer is taken for another command's."""

from __future__ import annotations

import pytest
import redis
from redis.connection import UnixDomainSocketConnection

from millstream.broker.transport.connection import Connection
from millstream.broker.transport.link import exchange


@pytest.fixture(params=["own", "shared"])
def client(connection: Connection, request: pytest.FixtureRequest) -> redis.Redis:
    return connection.own() if request.param == "own" else connection.client


def test_each_command_has_its_answer_and_a_refusal_is_a_value(client: redis.Redis) -> None:
    first, refused, last = exchange(client, ("ECHO", "1"), ("EVALSHA", "none", 0), ("ECHO", b"2"))

    assert (first, last) == (b"1", b"2")
    assert isinstance(refused, redis.exceptions.NoScriptError)


def test_a_connection_that_the_server_closed_is_an_error_once_and_nothing_is_sent_again(
    connection: Connection,
) -> None:
    client = connection.own()
    assert connection.client.client_kill_filter(_id=str(client.client_id())) == 1

    with pytest.raises(redis.ConnectionError):
        exchange(client, ("INCR", "exchange:test"))

    assert exchange(client, ("INCR", "exchange:test")) == [1]
    connection.client.delete("exchange:test")


def test_an_answer_that_was_not_read_is_not_the_next_commands(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connection.own()

    def interrupted(connection: UnixDomainSocketConnection, **options: object) -> None:
        raise KeyboardInterrupt

    exchange(client, ("PING",))
    monkeypatch.setattr(UnixDomainSocketConnection, "read_response", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exchange(client, ("ECHO", "unread"))
    monkeypatch.undo()

    assert exchange(client, ("ECHO", "next")) == [b"next"]


def test_an_argument_that_is_no_word_is_refused_and_the_connection_goes_on(connection: Connection) -> None:
    client = connection.own()

    with pytest.raises(redis.DataError):
        exchange(client, ("ECHO", object()))  # type: ignore[arg-type]

    assert exchange(client, ("ECHO", "next")) == [b"next"]
