"""Rows that were answered before are answered from Redis; all else runs, and no fault of the cache is a caller's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from bystander import Bystander
from integration.faults import SERVICE, milling
from support import eventually
from topologies import cluster
from workers import LONG_S, working

from millstream.broker.config.spec import CACHE_TTL_S, ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import Cancelled, ModelFailed, PartialFailure, WorkerLost
from millstream.broker.contract.job import PRIORITIES, Json, Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue import cache as module
from millstream.broker.queue.cache import Cache, Cached, CacheKey, encode
from millstream.broker.queue.pause import pause, resume
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client, Embeddings
from millstream.client.cache_reader import AT_ONCE

WEIGHTS = "echo:planted"


def caching(name: str, model_name: str = "", **runtime: object) -> ServiceSpec:
    limits = Runtime.model_validate({"enable_cache": True, "batch_size": 512, "max_batch_tokens": 100_000} | runtime)
    model = ModelSpec(type="echo", model_name=model_name)
    return ServiceSpec(name=name, model=model, model_ref="m", runtime=limits)


@pytest.fixture
def registered(service: str, connection: Connection) -> Iterator[str]:
    """The test's service, off the list of services in the end."""
    yield service
    connection.client.srem("ms:services", service)


def sent(connection: Connection, service: str) -> list[bytes]:
    """Changes with each job that is ever enqueued."""
    streams = ServiceKeys(service).streams()
    return [connection.client.xinfo_stream(stream)["last-generated-id"] for stream in streams]


def kept(connection: Connection, service: str) -> list[bytes]:
    return list(connection.client.scan_iter(match=ServiceKeys(service).cache("*"), count=1_000))


# -- a second pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_name", "rows"), [("vector:8", 10_000), ("", 700)])
def test_a_second_pass_runs_nothing_and_needs_no_worker(
    server: EmbeddedServer, connection: Connection, registered: str, model_name: str, rows: int
) -> None:
    texts: list[Json] = [f"text {number} " + "x" * (number % 7) for number in range(rows)]
    with working(server.url, caching(registered, model_name)), Client(server.url) as client:
        first = client.submit(registered, texts).result(LONG_S)
        before = sent(connection, registered)

        second = client.submit(registered, texts)

        assert second.ready
        assert np.array_equal(np.array(second.result()), np.array(first))
    with Client(server.url) as client:
        third = client.submit(registered, texts)
        assert third.ready
        assert np.array_equal(np.array(third.result()), np.array(first))
    assert sent(connection, registered) == before
    assert len(kept(connection, registered)) == len(texts)


def test_only_what_was_not_answered_yet_travels_and_the_order_is_kept(
    client: Client, bystander: Callable[..., Bystander], connection: Connection
) -> None:
    service = planted(bystander, connection, ["b", "d"])
    handle = client.submit(service.name, ["a", "b", "c", "d", "e"])
    (claim,) = service.claim(1)
    service.answer(claim)

    assert claim.job is not None
    assert claim.job.rows == 3
    assert handle.result(LONG_S) == ["a", "B", "c", "D", "e"]


def test_an_async_client_and_map_find_what_is_kept(
    server: EmbeddedServer, client: Client, bystander: Callable[..., Bystander], connection: Connection
) -> None:
    service = planted(bystander, connection, ["a", "b"])

    async def ask() -> tuple[object, list[object]]:
        async with AsyncClient(server.url) as async_client:
            handle = await async_client.submit(service.name, ["a", "b"])
            return await handle, [each async for each in async_client.map(service.name, ["b", "a"])]

    assert asyncio.run(ask()) == (["A", "B"], ["B", "A"])
    assert list(client.map(service.name, iter(["a", "b", "a"]), window=4)) == ["A", "B", "A"]
    assert service.queue.depth() == 0


def test_many_async_calls_at_once_are_looked_up_in_few_commands_and_by_no_executor(
    server: EmbeddedServer, bystander: Callable[..., Bystander], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = planted(bystander, connection, ["a", "b"])

    def commands() -> int:
        return int(connection.client.info("commandstats").get("cmdstat_mget", {}).get("calls", 0))

    async def ask() -> list[object]:
        async with AsyncClient(server.url) as client:
            await client.submit(service.name, ["a"])
            with monkeypatch.context() as patched:
                patched.setattr(asyncio, "to_thread", None)
                handles = await asyncio.gather(*(client.submit(service.name, ["b", "a"]) for _ in range(200)))
                return [await handle for handle in handles]

    before = commands()
    assert asyncio.run(ask()) == [["B", "A"]] * 200
    assert commands() - before <= 50
    assert service.queue.depth() == 0


def test_a_cut_text_is_reported_when_it_is_found_too(server: EmbeddedServer, registered: str, tiny_model: Path) -> None:
    model = ModelSpec(type="embedding", model_name=str(tiny_model), device="cpu")
    spec = caching(registered).model_copy(update={"model": model})
    texts = ["the mill", "the stream " * 40, "corn"]
    with working(server.url, spec), Client(server.url) as client:
        first = client.embed(texts, service=registered, truncate="end", timeout=LONG_S)

    with Client(server.url) as client:
        second = client.embed(texts, service=registered, truncate="end", timeout=1.0)

    assert isinstance(second, Embeddings)
    assert np.array_equal(first, second)
    assert (first.truncated, second.truncated) == ((1,), (1,))
    assert first.usage["tokens"] > 0
    assert second.usage["tokens"] == 0


def test_equal_texts_of_one_call_run_once(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander(enable_cache=True)
    handle = client.submit(service.name, ["a", "b", "a", "a", "c"])
    (claim,) = service.claim(1)
    service.answer(claim)

    assert claim.job is not None
    assert claim.job.rows == 3
    assert handle.result(LONG_S) == ["a", "b", "a", "a", "c"]


def test_like_calls_of_one_client_under_way_run_once(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander(enable_cache=True)
    handles = [client.submit(service.name, ["a"]) for _ in range(5)]
    eventually(lambda: service.queue.depth())
    other = client.submit(service.name, ["b"], priority="batch")
    eventually(lambda: service.queue.depth() == 2)
    assert handles[1].cancel()
    for claim in service.claim(2):
        service.answer(claim)

    assert [handle.result(LONG_S) for handle in (*handles[:1], *handles[2:], other)] == [["a"]] * 4 + [["b"]]
    with pytest.raises(Cancelled):
        handles[1].result()


def test_like_calls_share_a_failure_of_their_input_and_run_at_once_after_any_other(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(enable_cache=True)
    handles = [client.submit(service.name, ["a"]) for _ in range(20)]
    service.settle(service.claim_one(), Reply(error=WorkerLost("died")))

    others = service.claim(19)
    assert isinstance(handles[0].outcomes(LONG_S)[0], WorkerLost)
    service.answer(*others)
    assert [handle.result(LONG_S) for handle in handles[1:]] == [["a"]] * 19

    again = [client.submit(service.name, ["b"]) for _ in range(20)]
    service.settle(service.claim_one(), Reply(error=ModelFailed("no")))
    assert {type(handle.outcomes(LONG_S)[0]) for handle in again} == {ModelFailed}
    assert service.queue.depth() == 0


def test_a_job_that_its_caller_cancels_is_answered_to_those_who_asked_alike(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(enable_cache=True)
    first, second, third = [client.submit(service.name, ["a"]) for _ in range(3)]
    claim = service.claim_one()

    assert not first.cancel()
    with pytest.raises(Cancelled):
        first.result()
    assert third.cancel()
    assert service.queue.lease.beat("bystander", {}, [claim.address.name]).cancelled == []
    service.answer(claim)

    assert second.result(LONG_S) == ["a"]
    assert service.queue.depth() == 0


# -- and what is no second pass ------------------------------------------------------------------------------------


def planted(
    bystander: Callable[..., Bystander], connection: Connection, texts: Sequence[str], **runtime: object
) -> Bystander:
    """A service that a worker with WEIGHTS once served: its answers, in capitals, are kept."""
    service = bystander(**{"enable_cache": True, **runtime})
    Registry(connection).claim_fingerprint(service.name, WEIGHTS)
    names = CacheKey(WEIGHTS, "echo", "none", None).digests(texts, {})
    answers = [(name, encode(Cached(text.upper()))) for name, text in zip(names, texts, strict=True)]
    Cache(connection.client, ServiceKeys(service.name)).keep(answers, 60.0)
    return service


def finds(url: str, service: Bystander, truncate: str = "") -> bool:
    """Whether a client that knows nothing yet finds the answer of "a"; if not, it has sent a job."""
    with Client(url) as client:
        options: dict[str, Any] = {"truncate": truncate} if truncate else {}
        handle = client.submit(service.name, ["a"], **options)
        if not handle.ready:
            eventually(lambda: service.queue.depth() == 1)
            handle.cancel()
        return handle.ready and handle.outcomes() == ["A"]


def test_other_options_and_other_weights_find_nothing(
    server: EmbeddedServer, bystander: Callable[..., Bystander], connection: Connection
) -> None:
    service = planted(bystander, connection, ["a"])
    spec = service.queue.keys.spec()

    assert finds(server.url, service)
    assert not finds(server.url, service, truncate="end")
    connection.client.hset(spec, "fingerprint", "echo:other")
    assert not finds(server.url, service)
    connection.client.hdel(spec, "fingerprint")
    assert not finds(server.url, service)
    connection.client.hset(spec, "fingerprint", WEIGHTS)
    assert finds(server.url, service)


@pytest.mark.parametrize("runtime", [{"enable_cache": False}, {"truncate": "end"}])
def test_without_a_cache_or_with_another_setting_nothing_is_found(
    server: EmbeddedServer, bystander: Callable[..., Bystander], connection: Connection, runtime: dict[str, object]
) -> None:
    assert not finds(server.url, planted(bystander, connection, ["a"], **runtime))


def test_bytes_that_are_no_answer_are_a_miss(
    server: EmbeddedServer, bystander: Callable[..., Bystander], connection: Connection
) -> None:
    service = planted(bystander, connection, ["a"])
    (key,) = kept(connection, service.name)
    connection.client.set(key, b"\xff", px=60_000)

    assert not finds(server.url, service)


# -- what workers keep ---------------------------------------------------------------------------------------------


def test_errors_are_not_kept_and_twins_get_them_in_their_places(
    server: EmbeddedServer, connection: Connection, registered: str
) -> None:
    with working(server.url, caching(registered, "raise:bad", batch_size=1)), Client(server.url) as client:
        with pytest.raises(PartialFailure) as caught:
            client.submit(registered, ["bad", "good", "bad"]).result(LONG_S)

        assert sorted(caught.value.errors) == [0, 2]
        assert len(kept(connection, registered)) == 1


@pytest.mark.parametrize(("cache_ttl", "ttl_s"), [(None, CACHE_TTL_S), (20, 20.0)])
def test_what_is_kept_expires(
    server: EmbeddedServer, connection: Connection, registered: str, cache_ttl: int | None, ttl_s: float
) -> None:
    with working(server.url, caching(registered, cache_ttl=cache_ttl)), Client(server.url) as client:
        client.submit(registered, ["a"]).result(LONG_S)

    (key,) = kept(connection, registered)
    assert (ttl_s - 15) * 1000 < connection.client.pttl(key) <= ttl_s * 1000


def test_a_push_turns_the_cache_on_and_off_while_workers_run(
    server: EmbeddedServer, connection: Connection, registered: str
) -> None:
    on, off = caching(registered), caching(registered, enable_cache=False)
    registry, texts = Registry(connection), (f"text {number}" for number in range(10_000))

    with working(server.url, off), Client(server.url) as client:

        def keeps() -> bool:
            before = len(kept(connection, registered))
            client.submit(registered, [next(texts)]).result(LONG_S)
            return len(kept(connection, registered)) > before

        assert not keeps()
        registry.push([on], replace=True)
        eventually(keeps)
        registry.push([off], replace=True)
        eventually(lambda: not keeps())
        eventually(lambda: not client.submit(registered, ["text 0"]).ready)
        assert not keeps()


# -- faults --------------------------------------------------------------------------------------------------------


def test_a_server_without_memory_loses_the_cache_nothing_but_its_writes(
    tmp_path: Path, server_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_S", float("inf"))
    with milling(tmp_path, server_binary) as mill:
        client, keys = mill.connection.client, mill.queue.keys
        cache = Cache(client, keys)
        cache.keep([("0", encode(Cached("kept")))], 60.0)
        client.config_set("maxmemory", 1)

        cache.keep([("1", encode(Cached("x"))), ("2", encode(Cached("y")))], 60.0)

        assert cache.faults == 2
        assert isinstance(cache.fault, redis.OutOfMemoryError)
        assert cache.look_up(["0", "1", "2"]) == [Cached("kept"), None, None]
        client.config_set("maxmemory", 0)


def test_workers_answer_and_callers_find_while_the_server_has_no_memory(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary, enable_cache=True) as mill:
        client, keys = mill.connection.client, mill.queue.keys
        mill.client.submit(SERVICE, ["before"]).result(LONG_S)
        pause(client, keys)
        handle = mill.client.submit(SERVICE, ["meanwhile"])
        eventually(lambda: mill.queue.depth() == 1)
        client.config_set("maxmemory", 1)
        resume(client, keys)

        assert handle.result(LONG_S) == ["meanwhile"]
        assert mill.client.submit(SERVICE, ["before"]).result(LONG_S) == ["before"]
        assert len(kept(mill.connection, SERVICE)) == 1
        assert mill.supervisor.restarts == 0
        client.config_set("maxmemory", 0)


def test_streams_of_every_priority_share_what_is_kept(
    client: Client, bystander: Callable[..., Bystander], connection: Connection
) -> None:
    service = planted(bystander, connection, ["a"])

    assert [client.submit(service.name, ["a"], priority=each.value).result() for each in PRIORITIES] == [["A"]] * 3


def test_in_a_cluster_answers_are_kept_and_found_beside_their_service(tmp_path: Path) -> None:
    texts: list[Json] = [f"text {number}" for number in range(700)]
    with cluster(tmp_path) as running, working(running.url, caching("one")), Client(running.url) as client:
        first = client.submit("one", texts).result(LONG_S)

        again = client.submit("one", texts)

        assert again.ready
        assert again.result() == first


def test_many_threads_look_up_over_a_handful_of_connections(
    server: EmbeddedServer, bystander: Callable[..., Bystander], connection: Connection
) -> None:
    service = planted(bystander, connection, ["a"])
    before = connected(connection)
    with Client(server.url) as client, ThreadPoolExecutor(100) as threads:
        calls = [threads.submit(lambda: client.submit(service.name, ["a"]).result()) for _ in range(2_000)]

        assert [call.result() for call in calls] == [["A"]] * 2_000
        # The registry is read over one more, and once a second the hits are added over another.
        assert connected(connection) - before <= AT_ONCE + 2


def connected(connection: Connection) -> int:
    """Sockets that clients of any process have open."""
    return sum(1 for each in connection.client.client_list() if each["name"] == "millstream-client")
