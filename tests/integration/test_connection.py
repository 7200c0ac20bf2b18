"""A connection times out when it should, says what is wrong in our words, and leaves retrying to us."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import redis
from engines import crash
from support import eventually

from millstream.broker.config.load import Config, RedisSettings
from millstream.broker.contract.errors import BrokerUnavailable, ConfigError, MillstreamError, QueueFull
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import (
    Connection,
    ServerInfo,
    check,
    find_url,
    is_missing_group,
    is_transient,
    redacted,
    retrying,
    translated,
)


@pytest.fixture
def own_server(tmp_path: Path, server_binary: Path) -> Iterator[EmbeddedServer]:
    """A server that a test may harm."""
    with EmbeddedServer.start(tmp_path / "data", binary=server_binary, tcp_port=0) as running:
        yield running


@contextmanager
def opened(url: str) -> Iterator[Connection]:
    connection = Connection(url, name="tests")
    yield connection
    connection.close()


@contextmanager
def frozen(server: EmbeddedServer) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def ask(connection: Connection, action: Callable[[], object]) -> MillstreamError:
    with pytest.raises((BrokerUnavailable, QueueFull)) as caught, translated(connection.safe_url):
        action()
    return caught.value


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_both_addresses_reach_the_server_by_name_and_speak_bytes(server: EmbeddedServer, kind: str) -> None:
    url = server.url if kind == "unix" else server.tcp_url
    assert url is not None

    with opened(url) as connection:
        connection.client.set("ms:bytes", b"\xff", ex=5)

        assert connection.client.get("ms:bytes") == b"\xff"
        assert connection.client.client_getname() == "tests"


def test_connecting_sends_nothing_that_a_server_before_7_2_refuses(own_server: EmbeddedServer) -> None:
    with opened(own_server.url) as connection:
        connection.client.ping()

        assert "cmdstat_client|setinfo" not in connection.client.info("commandstats")
        assert "cmdstat_hello" not in connection.client.info("commandstats")


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:1",
        "redis+sentinel://localhost/0",
        "localhost:6379",
        "",
        "redis://",
        "redis://:p4ss/word@localhost",
        "redis://localhost:port",
        "redis://localhost/seven",
        "redis://localhost?socket_timeout=60",
        "redis://localhost?protocol=3",
        "redis://localhost?ssl_cert_reqs=none",
        "unix://relative/path",
        "unix://",
    ],
)
def test_a_bad_url_is_refused_with_the_accepted_forms(url: str) -> None:
    with pytest.raises(ConfigError, match=r"rediss://.*unix:///") as caught:
        Connection(url)

    assert "p4ss" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:1/0", "redis://host:1/0"),
        ("redis://ann:p4ss@host:1/0", "redis://ann:***@host:1/0"),
        ("rediss://:p4@ss@host", "rediss://:***@host"),
        ("redis://:p4/ss@host", "redis://:***@host"),
        ("unix:///run/a.sock?db=1&password=p4ss", "unix:///run/a.sock?db=1&password=***"),
        ("unix:///run/a:b@c.sock", "unix:///run/a:b@c.sock"),
        ("rediss://host?ssl_password=p4ss&db=1", "rediss://host?ssl_password=***&db=1"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_a_dead_server_is_reported_with_its_address_and_what_to_do(tmp_path: Path) -> None:
    with opened(f"unix://{tmp_path}/gone.sock?password=p4ss") as connection:
        error = ask(connection, connection.client.ping)

        assert "gone.sock" in str(error)
        assert "p4ss" not in str(error) + repr(connection)
        assert "millstream up" in error.hint
        assert "MILLSTREAM_REDIS_URL" in error.hint
        assert is_transient(error)


def test_a_frozen_server_is_reported_within_the_timeout_and_gets_the_command_once(own_server: EmbeddedServer) -> None:
    with opened(own_server.url) as connection:
        blocking = connection.blocking(0.2)
        connection.client.ping()
        blocking.ping()
        errors: list[MillstreamError] = []
        waiter = threading.Thread(target=lambda: errors.append(ask(connection, lambda: blocking.blpop(["ms:x"], 0.2))))

        with frozen(own_server):
            began = time.monotonic()
            waiter.start()
            errors.append(ask(connection, lambda: connection.client.rpush("ms:list", "once")))
            waiter.join()
            took = time.monotonic() - began

        assert [str(error).count("did not answer in time") for error in errors] == [1, 1]
        assert took < 7
        eventually(lambda: bool(connection.client.llen("ms:list")))
        assert connection.client.llen("ms:list") == 1


def test_a_block_longer_than_the_plain_timeout_is_no_error(connection: Connection) -> None:
    assert connection.blocking(6.0).blpop(["ms:nobody-pushes"], timeout=5.2) is None


def test_closing_wakes_a_blocked_thread(server: EmbeddedServer) -> None:
    errors: list[MillstreamError] = []
    with opened(server.url) as connection, opened(server.url) as observer:
        blocking = connection.blocking(30.0)
        thread = threading.Thread(target=lambda: errors.append(ask(connection, lambda: blocking.blpop(["ms:x"], 30))))
        thread.start()
        eventually(lambda: "blpop" in [client["cmd"] for client in observer.client.client_list()])

        connection.close()
        thread.join(timeout=5)

    assert is_transient(errors[0])


def test_a_forked_child_opens_sockets_of_its_own(connection: Connection) -> None:
    mine = connection.client.client_id()
    reader, writer = os.pipe()

    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(connection.client.client_id()).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)

    assert int(os.read(reader, 32)) != mine
    assert connection.client.client_id() == mine
    os.close(reader)
    os.close(writer)


def test_out_of_memory_is_a_full_queue_that_may_be_retried_later(own_server: EmbeddedServer) -> None:
    with opened(own_server.url) as connection:
        connection.client.config_set("maxmemory", 1)

        for write in (
            lambda: connection.client.set("ms:x", "y"),
            lambda: connection.client.eval("return redis.call('SET', KEYS[1], 'y')", 1, "ms:x"),
        ):
            error = ask(connection, write)

            assert isinstance(error, QueueFull)
            assert error.retry_after == 1.0
            assert "maxmemory" in error.hint


def test_wrong_or_missing_rights_are_reported_as_such_and_not_retried(own_server: EmbeddedServer) -> None:
    with opened(own_server.url) as admin:
        admin.client.acl_setuser("ann", enabled=True, passwords=["+right"], commands=["+ping", "+client"])
        admin.client.acl_setuser("default", enabled=False)
        who = own_server.url.replace("unix://", "unix://{}@", 1)

        for url in (who.format("ann") + "?password=wrong", own_server.url, who.format("ann") + "?password=right"):
            with opened(url) as connection:
                error = ask(connection, partial(connection.client.get, "ms:x"))

            assert "refuses this user" in str(error)
            assert "ACL" in error.hint
            assert "millstream up" not in str(error)
            assert not is_transient(error)


def test_a_replica_is_unavailable_for_writing(own_server: EmbeddedServer) -> None:
    with opened(own_server.url) as connection:
        connection.client.replicaof("127.0.0.1", "1")

        for write in (
            lambda: connection.client.set("ms:x", "y"),
            lambda: connection.client.eval("return redis.call('SET', KEYS[1], 'y')", 1, "ms:x"),
        ):
            assert "read-only replica" in str(ask(connection, write))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("ERR Error running script (call to f_1): @user_script:1: -READONLY You can't write", "read-only replica"),
        ("UNBLOCKED the previous master is now a slave", "read-only replica"),
        ("UNBLOCKED force unblock from blocking operation, instance state changed", "read-only replica"),
        ("MISCONF Valkey is configured to save", "cannot write to its disk"),
        ("NOREPLICAS Not enough good replicas to write.", "too few replicas"),
        ("BUSY Valkey is busy running a script.", "busy"),
        ("MASTERDOWN Link with MASTER is down", "not whole"),
    ],
)
def test_a_refusal_is_known_by_its_words_where_the_library_has_no_class(words: str, says: str) -> None:
    error = redis.ResponseError(words)

    with pytest.raises(BrokerUnavailable, match=says), translated("unix:///x"):
        raise error

    assert is_transient(error)


def test_out_of_memory_inside_a_script_of_redis_6_2_is_a_full_queue() -> None:
    with pytest.raises(QueueFull), translated("unix:///x"):
        raise redis.ResponseError("ERR Error running script (call to f_1): @user_script:1: -OOM command not allowed")


@pytest.mark.parametrize("words", ["NOGROUP No such key", "WRONGTYPE Operation against", "BUSYGROUP Consumer Group"])
def test_an_answer_to_the_command_itself_passes_through(words: str) -> None:
    error = redis.ResponseError(words)

    with pytest.raises(redis.ResponseError) as caught, translated("unix:///x"):
        raise error

    assert caught.value is error
    assert not is_transient(error)


@pytest.mark.parametrize(
    ("error", "is_missing"),
    [
        (redis.ResponseError("NOGROUP No such key 'ms:q' or consumer group 'workers'"), True),
        (redis.ResponseError("Error running script (call to f_1): @user_script:1: -NOGROUP No such key"), True),
        (redis.ResponseError("BUSYGROUP Consumer Group name already exists"), False),
        (ValueError("NOGROUP"), False),
        (None, False),
    ],
)
def test_a_missing_group_is_known_by_the_error_of_the_server(error: object, is_missing: bool) -> None:
    assert is_missing_group(error) is is_missing


@pytest.mark.parametrize(
    ("answer", "says", "transient"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "is loading its data", True),
        (b"-ERR max number of clients reached\r\n", "accepts no more connections", True),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak the Redis protocol", False),
    ],
)
def test_what_is_not_a_ready_server_is_reported(answer: bytes, says: str, transient: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_answer_once, args=(listener, answer), daemon=True).start()
        with opened(f"redis://127.0.0.1:{listener.getsockname()[1]}") as connection:
            error = ask(connection, connection.client.ping)

    assert says in str(error)
    assert is_transient(error) is transient


def _answer_once(listener: socket.socket, answer: bytes) -> None:
    link, _ = listener.accept()
    with link:
        link.recv(1024)
        link.sendall(answer)
        link.recv(1024)


def test_retrying_rides_out_a_restart(own_server: EmbeddedServer) -> None:
    with opened(own_server.url) as connection:
        connection.client.set("ms:x", "kept")
        crash(own_server)
        restarter = threading.Timer(0.2, own_server.restart)
        restarter.start()

        value = retrying(lambda: connection.client.get("ms:x"), until=time.monotonic() + 10)

        restarter.join()
        assert value == b"kept"


def test_retrying_gives_up_at_its_deadline_with_the_last_error(tmp_path: Path) -> None:
    with opened(f"unix://{tmp_path}/gone.sock") as connection:
        began = time.monotonic()

        with pytest.raises(redis.ConnectionError):
            retrying(connection.client.ping, until=began + 0.3)

        assert time.monotonic() - began < 0.3 + 0.1


def test_retrying_ends_when_it_is_stopped(tmp_path: Path) -> None:
    stop = threading.Event()
    with opened(f"unix://{tmp_path}/gone.sock") as connection:
        threading.Timer(0.1, stop.set).start()

        with pytest.raises(redis.ConnectionError):
            retrying(connection.client.ping, stop=stop)


def test_retrying_does_not_repeat_what_cannot_succeed() -> None:
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise redis.ResponseError("NOGROUP No such key")

    with pytest.raises(redis.ResponseError):
        retrying(fails)

    assert len(calls) == 1


def test_the_server_is_known_by_engine_and_version(connection: Connection, server: EmbeddedServer) -> None:
    assert check(connection) == ServerInfo(server.engine, server.version)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"redis_version": "6.0.16"}, "redis 6.0.16"),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.0"}, "valkey 7.1.0"),
    ],
)
def test_a_server_below_the_floor_is_refused(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, answer: dict[str, str], says: str
) -> None:
    monkeypatch.setattr(connection.client, "info", lambda section: answer)

    with pytest.raises(ConfigError, match=rf"{says}.*(redis 6\.2|valkey 7\.2)"):
        check(connection)


def test_the_url_comes_from_flag_then_environment_then_file_then_the_local_server(server: EmbeddedServer) -> None:
    environ = {"MILLSTREAM_REDIS_URL": "redis://environment"}
    local = {"MILLSTREAM_DATA_DIR": str(server.data_dir)}
    config = Config(models={}, services={}, redis=RedisSettings(url="redis://file"))
    moved = Config(models={}, services={}, redis=RedisSettings(data_dir=server.data_dir))

    assert find_url("redis://flag", config, environ) == "redis://flag"
    assert find_url(None, config, environ) == "redis://environment"
    assert find_url(None, config, {}) == "redis://file"
    assert find_url(None, None, local) == server.url
    assert find_url(None, moved, {}) == server.url


def test_without_any_server_the_error_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match=r"millstream up.*MILLSTREAM_REDIS_URL"):
        find_url(None, None, {"MILLSTREAM_DATA_DIR": str(tmp_path)})
