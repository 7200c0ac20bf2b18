"""Services are published once, changed on purpose, and found by nearly their name."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest
import redis
from contracts.queue import Queue, draft

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import BrokerUnavailable, ConfigError, UnknownService
from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.contract.keys import services_key
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.stream_types import Admission, Group
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection


def spec(name: str = "embed", model: ModelSpec | None = None, **runtime: object) -> ServiceSpec:
    echo = model or ModelSpec(type="echo", model_name="sleep:0.1")
    return ServiceSpec(name=name, model=echo, model_ref="m", runtime=Runtime.model_validate(runtime))


@pytest.fixture
def prefix() -> str:
    """No other test sees what is registered under it."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def registry(connection: Connection, prefix: str) -> Iterator[Registry]:
    yield Registry(connection, prefix)
    connection.client.unlink(prefix, *connection.client.scan_iter(f"{prefix}*", count=1000))


def test_what_was_pushed_is_read_again(registry: Registry) -> None:
    pushed = spec(batch_size=17, queue_timeout=0.5, priorities={"batch": {"total_timeout": 60}})

    assert registry.push([pushed]) == ["embed"]

    assert registry.read("embed") == pushed
    assert registry.names() == ["embed"]


def test_pushing_the_same_again_changes_nothing(registry: Registry) -> None:
    registry.push([spec("a"), spec("b")])

    assert registry.push([spec("a"), spec("b"), spec("c")]) == ["c"]
    assert registry.names() == ["a", "b", "c"]


def test_a_differing_specification_is_refused_and_told_apart(registry: Registry) -> None:
    registry.push([spec(batch_size=32)])

    with pytest.raises(ConfigError, match=r"runtime\.batch_size is 32, here 64") as caught:
        registry.push([spec("new"), spec(batch_size=64)])

    assert "--replace" in caught.value.hint
    assert registry.read("embed").runtime.batch_size == 32
    assert registry.names() == ["embed"]


def test_replacing_changes_only_what_differs(registry: Registry) -> None:
    registry.push([spec("a"), spec("b")])

    assert registry.push([spec("a"), spec("b", batch_size=5)], replace=True) == ["b"]

    assert registry.read("b").runtime.batch_size == 5


def test_an_unknown_service_meets_the_nearest_name(registry: Registry) -> None:
    registry.push([spec("embedding"), spec("chat")])

    with pytest.raises(UnknownService) as near:
        registry.read("embeding")
    with pytest.raises(UnknownService) as far:
        registry.read("zzz")

    assert near.value.did_you_mean == "embedding"
    assert "did you mean embedding?" in str(near.value)
    assert far.value.did_you_mean == ""
    assert "chat, embedding" in far.value.hint


def test_without_any_service_the_hint_says_how_to_register_one(registry: Registry) -> None:
    with pytest.raises(UnknownService) as caught:
        registry.read("embed")

    assert "config push" in caught.value.hint
    assert registry.names() == []


def test_a_pushed_service_takes_jobs_at_once_up_to_its_limit(registry: Registry, connection: Connection) -> None:
    registry.push([spec(max_queue_size=2)])
    queue = Queue(connection.client, registry.keys("embed"))
    groups = [Group(Priority.NORMAL, [draft()]) for _ in range(3)]

    admissions = queue.streams.enqueue(groups)

    assert [admission.refused for admission in admissions] == ["", "", "queue_full"]
    assert len(queue.claim().claims) == 2


def test_a_number_limits_each_priority_by_itself(registry: Registry, connection: Connection) -> None:
    registry.push([spec(max_queue_size=2, priorities={"batch": {"max_queue_size": 3}})])
    queue = Queue(connection.client, registry.keys("embed"))
    groups = [Group(priority, [draft()]) for priority in PRIORITIES for _ in range(4)]

    admissions = queue.streams.enqueue(groups)

    refused = [(admission.refused, admission.limit) for admission in admissions]
    accepted, two, three = ("", 0), ("queue_full", 2), ("queue_full", 3)
    assert refused == [accepted, accepted, two, two] * 2 + [accepted, accepted, accepted, three]


def test_clients_of_the_version_before_count_each_priority_by_itself_too(
    registry: Registry, connection: Connection
) -> None:
    """They refuse a job if all three streams together have `max_queue_size` jobs, or its own has its own limit."""
    registry.push([spec(max_queue_size=2, priorities={"batch": {"max_queue_size": 3}})])

    names = ("max_queue_size", "max_queue_realtime", "max_queue_normal", "max_queue_batch")
    assert connection.client.hmget(registry.keys("embed").spec(), *names) == [b"7", b"2", b"2", b"3"]


def test_a_limit_that_was_replaced_holds_from_then_on(registry: Registry, connection: Connection) -> None:
    registry.push([spec(max_queue_size=1)])
    queue = Queue(connection.client, registry.keys("embed"))
    queue.put(draft())
    again = [Group(Priority.NORMAL, [draft()])]
    assert queue.streams.enqueue(again) != [Admission()]

    registry.push([spec(max_queue_size=2)], replace=True)

    assert queue.streams.enqueue(again) == [Admission()]
    assert queue.depth() == 2


def test_a_limit_that_was_taken_out_holds_no_more(registry: Registry, connection: Connection) -> None:
    limits = {"realtime": {"max_queue_size": 1}, "normal": {"max_queue_size": 1}, "batch": {"max_queue_size": 1}}
    registry.push([spec(priorities=limits, rate_limit={"requests": 1, "rows": 1, "tokens": 1, "per": "tenant"})])
    registry.push([spec(priorities={"normal": {"max_queue_size": 2}})], replace=True)
    queue = Queue(connection.client, registry.keys("embed"))

    queue.put(*[draft() for _ in range(5)], priority=Priority.REALTIME)
    queue.put(*[draft() for _ in range(5)], priority=Priority.BATCH)
    queue.put(draft(), draft())
    assert queue.streams.enqueue([Group(Priority.NORMAL, [draft()])]) == [Admission("queue_full", 0.1, 2)]

    registry.push([spec()], replace=True)
    queue.put(*[draft() for _ in range(5)])


@pytest.mark.parametrize("step", ["sadd", "xgroup_create", "pipeline"])
def test_a_push_that_was_cut_off_is_completed_by_the_next(
    registry: Registry, connection: Connection, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as cut:
        cut.setattr(connection.client, step, lambda *_, **__: _cut_off())
        with pytest.raises(BrokerUnavailable):
            registry.push([spec(batch_size=7)])

    registry.push([spec(batch_size=7)])

    assert registry.names() == ["embed"]
    assert registry.read("embed").runtime.batch_size == 7
    Queue(connection.client, registry.keys("embed")).put(draft())


def test_limits_and_revision_change_with_the_specification_or_not_at_all(
    registry: Registry, connection: Connection
) -> None:
    registry.push([spec()])
    with connection.client.monitor() as seen:  # type: ignore[no-untyped-call]
        registry.push([spec(max_queue_size=7)], replace=True)
        connection.client.echo("over")
        commands: list[str] = []
        while not any("over" in command for command in commands):
            commands.append(str(seen.next_command()["command"]))
    key = registry.keys("embed").spec()
    writes = [at for at, command in enumerate(commands) if command.startswith(("HSET", "HINCRBY")) and key in command]

    first = commands.index("MULTI")
    assert set(writes) <= set(range(first, commands.index("EXEC", first)))
    assert len(writes) == 3


def _cut_off() -> NoReturn:
    raise redis.ConnectionError("cut")


def test_code_is_neither_published_nor_taken_from_the_server(registry: Registry, connection: Connection) -> None:
    registry.push([spec(model=ModelSpec(type="custom", handler="os:system"))])
    key = registry.keys("embed").spec()
    record = connection.client.hget(key, "spec")
    assert isinstance(record, bytes)
    assert b"os:system" not in record

    connection.client.hset(key, "spec", record.replace(b'"priority":', b'"handler":"os:system","priority":'))

    assert registry.read("embed").model.handler is None


@pytest.mark.parametrize("record", ["", "{", "[]", '{"name":5}', "\x00\xff"])
def test_a_record_that_cannot_be_read_says_how_to_write_it_again(
    registry: Registry, connection: Connection, record: str
) -> None:
    connection.client.hset(registry.keys("embed").spec(), "spec", record)

    with pytest.raises(ConfigError, match="--replace"):
        registry.read("embed")


def test_a_record_that_cannot_be_read_can_be_replaced(registry: Registry, connection: Connection) -> None:
    connection.client.hset(registry.keys("embed").spec(), "spec", "{")

    with pytest.raises(ConfigError, match="--replace"):
        registry.push([spec()])
    assert registry.push([spec()], replace=True) == ["embed"]

    assert registry.read("embed") == spec()


def test_registered_names_are_kept_under_the_prefix(registry: Registry, connection: Connection, prefix: str) -> None:
    registry.push([spec()])

    assert connection.client.smembers(services_key(prefix)) == {b"embed"}
    assert "embed" not in Registry(connection, f"{prefix}-other").names()


WEIGHTS, OTHERS = "6448fa205c576c66+12f420f8 float32 2", "00112233445566aa+12f420f8 float32 2"


def test_the_first_workers_answer_stands_and_a_far_one_is_refused(registry: Registry, connection: Connection) -> None:
    registry.push([spec()])
    registry.claim_fingerprint("embed", WEIGHTS, {0: 0.6, 1: 0.8})

    registry.claim_fingerprint("embed", WEIGHTS, {0: 0.601, 1: 0.799})
    with pytest.raises(ConfigError, match="differs from the first worker's by 1") as caught:
        registry.claim_fingerprint("embed", WEIGHTS, {0: -0.6, 1: 0.8})

    assert "--replace" in caught.value.hint
    assert connection.client.hget(registry.keys("embed").spec(), f"answer {WEIGHTS}") == b'{"0":0.6,"1":0.8}'


def test_a_push_without_live_workers_forgets_the_answer_with_the_weights(registry: Registry) -> None:
    registry.push([spec()])
    registry.claim_fingerprint("embed", WEIGHTS, {0: 0.6, 1: 0.8})

    registry.push([spec()], replace=True)

    registry.claim_fingerprint("embed", WEIGHTS, {0: -0.6, 1: 0.8})


def test_an_older_versions_push_leaves_no_answer_that_other_weights_are_held_to(
    registry: Registry, connection: Connection
) -> None:
    """It forgets the fingerprint alone: workers of the new weights were refused for good."""
    registry.push([spec()])
    registry.claim_fingerprint("embed", WEIGHTS, {0: 0.6, 1: 0.8})
    connection.client.hdel(registry.keys("embed").spec(), "fingerprint")

    registry.claim_fingerprint("embed", OTHERS, {0: -0.6, 1: 0.8})

    with pytest.raises(ConfigError, match="differs from the first worker's"):
        registry.claim_fingerprint("embed", OTHERS, {0: 0.6, 1: 0.8})
    registry.push([spec()], replace=True)
    record = registry.record("embed")
    assert record
    assert not [field for field in record if field.startswith((b"answer", b"fingerprint"))]


def test_a_full_server_lets_a_worker_start_without_its_answer(tmp_path: Path, server_binary: Path) -> None:
    with (
        EmbeddedServer.start(tmp_path / "data", binary=server_binary, tcp_port=0) as server,
        closing(Connection(server.url, name="tests")) as connection,
    ):
        registry = Registry(connection)
        registry.push([spec()])
        registry.claim_fingerprint("embed", WEIGHTS)
        connection.client.config_set("maxmemory", 1)

        registry.claim_fingerprint("embed", WEIGHTS, {0: 0.6, 1: 0.8})

        connection.client.config_set("maxmemory", 0)
        registry.claim_fingerprint("embed", WEIGHTS, {0: -0.6, 1: 0.8})
        with pytest.raises(ConfigError, match="differs from the first worker's"):
            registry.claim_fingerprint("embed", WEIGHTS, {0: 0.6, 1: 0.8})
