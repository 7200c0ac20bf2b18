"""What no embedding model could do is refused before it is sent, and answers keep the form they were asked for in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from bystander import Bystander

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.codec import decode_inputs
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Encoded, Reply
from millstream.broker.queue.cache import Cache, Cached, CacheKey, encode
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client, Embeddings

WRONG: list[dict[str, Any]] = [
    {"input_type": "passage"},
    {"input_type": "query", "prompt": "q: "},
    {"dimensions": 0},
    {"normalize": "yes"},
    {"encoding": "int8"},
]


@pytest.fixture
def embedder(connection: Connection, service: str) -> Iterator[Bystander]:
    model = ModelSpec(type="embedding", model_name="some/model")
    yield Bystander(connection, ServiceSpec(name=service, model=model, model_ref="m", runtime=Runtime()))
    connection.client.srem("ms:services", service)


@pytest.mark.parametrize("options", WRONG)
@pytest.mark.parametrize(
    "call",
    [
        lambda client, service, options: client.embed(["a"], service=service, **options),
        lambda client, service, options: client.submit(service, ["a"], **options),
        lambda client, service, options: list(client.map(service, ["a"], **options)),
        lambda client, service, options: client.submit_detached(service, ["a"], **options),
    ],
    ids=["embed", "submit", "map", "submit_detached"],
)
def test_what_no_model_could_do_is_refused_and_not_sent(
    client: Client,
    embedder: Bystander,
    call: Callable[[Client, str, dict[str, Any]], object],
    options: dict[str, Any],
) -> None:
    with pytest.raises(InvalidRequest):
        call(client, embedder.name, options)

    assert embedder.queue.depth() == 0


def test_an_option_nobody_knows_is_refused_with_those_there_are(client: Client, embedder: Bystander) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.submit(embedder.name, ["a"], input_typ="query")

    assert "input_type" in refused.value.hint


def test_the_async_client_refuses_the_same(server: EmbeddedServer, embedder: Bystander) -> None:
    async def refused() -> None:
        async with AsyncClient(server.url) as client:
            for options in WRONG:
                with pytest.raises(InvalidRequest):
                    await client.embed(["a"], service=embedder.name, **options)

    asyncio.run(refused())


def test_an_answer_that_was_kept_is_found_by_those_who_ask_for_the_same(
    client: Client, connection: Connection, embedder: Bystander
) -> None:
    runtime = Runtime(enable_cache=True)
    model = ModelSpec(type="embedding", model_name="some/model")
    spec = ServiceSpec(name=embedder.name, model=model, model_ref="m", runtime=runtime)
    registry = Registry(connection)
    registry.push([spec], replace=True)
    registry.claim_fingerprint(embedder.name, "weights")
    cache_key = CacheKey.of(spec, "weights", "embed")
    kept = np.array([1, 255, 7], np.uint8)
    (name,) = cache_key.digests(["a"], {"encoding": "binary"})
    Cache(connection.client, registry.keys(embedder.name)).keep([(name, encode(Cached(kept)))], 60.0)

    found = client.embed(["a", "a"], service=embedder.name, encoding="binary")

    assert found.dtype == np.uint8
    assert found.tolist() == [[1, 255, 7]] * 2
    assert embedder.queue.depth() == 0
    client.submit(embedder.name, ["a"], encoding="float16")
    client.submit(embedder.name, ["a"])
    assert len(embedder.claim(2)) == 2


@pytest.mark.parametrize("dtype", [np.float16, np.uint8])
def test_vectors_keep_their_type_on_the_way(
    client: Client, embedder: Bystander, dtype: type[np.float16] | type[np.uint8]
) -> None:
    encoding = "float16" if dtype is np.float16 else "binary"
    handle = client.submit(embedder.name, ["a", "b"], encoding=encoding, input_type="query")
    vectors = cast(Encoded, np.array([[1, 2, 3], [4, 5, 6]], dtype))

    claim = embedder.claim_one()
    assert claim.job is not None
    assert decode_inputs(claim.job.body, 2) == (["a", "b"], {"encoding": encoding, "input_type": "query"})
    embedder.settle(claim, Reply(vectors=vectors, tokens=7, truncated=(1,)))

    got = handle.result(timeout=30)
    assert isinstance(got, Embeddings)
    assert got.dtype == dtype
    assert (got.tolist(), got.usage, got.truncated) == (vectors.tolist(), {"tokens": 7}, (1,))
