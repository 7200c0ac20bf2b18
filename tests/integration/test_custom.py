"""A user's own function as a service: any JSON in and out, and a bad payload hurts no neighbour."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mill import FITS
from support import eventually
from workers import LONG_S, remove, spec, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, MillstreamError, ModelFailed
from millstream.broker.contract.job import Json
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client, Embeddings
from millstream.client.row_results import RowOutcome

TESTS = Path(__file__).parents[1]
ROWS, BAD = 64, 41
LONG = "word " * 129

WAYS: dict[str, tuple[type[MillstreamError], str]] = {
    "raise": (ModelFailed, "RuntimeError: a stone in the mill"),
    "exit": (ModelFailed, "SystemExit: a stone in the mill"),
    "interrupt": (ModelFailed, "KeyboardInterrupt: a stone in the mill"),
    "cancel": (ModelFailed, "CancelledError: a stone in the mill"),
    "exhaust": (ModelFailed, "MemoryError"),
    "exhaust the device": (ModelFailed, "CUDA out of memory"),
    "miscount": (ModelFailed, "0 results for 1 rows"),
    "nan": (ModelFailed, "cannot be encoded as JSON"),
    "set": (ModelFailed, "cannot be encoded as JSON"),
    "error": (ModelFailed, "ValueError: a stone in the mill"),
    "cancelled": (ModelFailed, "CancelledError: a stone in the mill"),
}


def custom(handler: str, **runtime: object) -> ServiceSpec:
    name = f"test-{handler.rpartition(':')[2].lower()}-{uuid.uuid4().hex[:8]}"
    model = ModelSpec(type="custom", handler=handler)
    return ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime.model_validate(runtime))


@pytest.fixture(scope="module")
def services(server: EmbeddedServer) -> Iterator[dict[str, str]]:
    """A worker process each for code of mill.py, and for texts of at most 128 words."""
    mill, narrow = custom("mill:Mill", batch_size=ROWS), custom("mill:Narrow", batch_size=ROWS)
    short = spec(f"test-short-{uuid.uuid4().hex[:8]}", batch_size=ROWS)
    short = short.model_copy(update={"model": ModelSpec(type="echo", max_length=128)})
    every = {
        "mill": mill,
        "narrow": narrow,
        "short": short,
        "echo": custom("mill:echo", batch_size=8),
        "sizes": custom("mill:sizes", batch_size=4),
        "collector": custom("mill:collector"),
        "standard_input": custom("mill:standard_input", stall_timeout=5),
        "inherited": custom("mill:inherited"),
        "terminated": custom("mill:terminated"),
        "vectors": custom("mill:vectors", batch_size=ROWS),
    }
    with working(server.url, *every.values(), folder=TESTS):
        yield {which: each.name for which, each in every.items()}
    for each in every.values():
        remove(server.url, each.name)


Outcomes = Callable[[Client, str, list[object]], list[RowOutcome]]


def in_one_call(client: Client, service: str, payloads: list[object]) -> list[RowOutcome]:
    return client.submit(service, payloads, timeout=LONG_S).outcomes()  # type: ignore[arg-type]


def as_jobs(client: Client, service: str, payloads: list[object]) -> list[RowOutcome]:
    handles = [client.submit(service, [each], timeout=LONG_S) for each in payloads]  # type: ignore[list-item]
    return [handle.outcomes()[0] for handle in handles]


both = pytest.mark.parametrize("outcomes", [in_one_call, as_jobs])


def pids(connection: Connection, service: str) -> list[int]:
    return [each.pid for each in Inspector(connection).services([service])[0].workers]


def test_the_garbage_collector_passes_over_what_was_loaded_and_looks_at_the_rest_as_ever(
    client: Client, services: dict[str, str]
) -> None:
    objects, threshold = client.call(services["collector"], None)

    assert objects > 10_000
    assert threshold == gc.get_threshold()[0]


@both
@pytest.mark.parametrize("way", WAYS)
def test_one_bad_payload_of_64_fails_alone_in_the_same_process(
    client: Client, connection: Connection, services: dict[str, str], outcomes: Outcomes, way: str
) -> None:
    payloads: list[object] = [{"n": n} if n != BAD else {"n": n, "do": way} for n in range(ROWS)]
    before = pids(connection, services["mill"])
    _, rows_before = client.call(services["mill"], {"do": "seen"})

    got = outcomes(client, services["mill"], payloads)

    kind, message = WAYS[way]
    assert type(got[BAD]) is kind
    assert message in str(got[BAD])
    assert [each for n, each in enumerate(got) if n != BAD] == [2 * n for n in range(ROWS) if n != BAD]
    _, rows = client.call(services["mill"], {"do": "seen"})
    assert rows - rows_before <= 3 * ROWS
    assert len(before) == 1
    assert pids(connection, services["mill"]) == before


@both
def test_a_payload_that_json_cannot_carry_is_not_sent_and_its_neighbours_are_answered(
    client: Client, services: dict[str, str], outcomes: Outcomes
) -> None:
    payloads: list[object] = [{"n": n} for n in range(ROWS)]
    payloads[BAD] = {"n": object()}
    _, rows_before = client.call(services["mill"], {"do": "seen"})

    got = outcomes(client, services["mill"], payloads)

    assert type(got[BAD]) is InvalidRequest
    assert [each for n, each in enumerate(got) if n != BAD] == [2 * n for n in range(ROWS) if n != BAD]
    _, rows = client.call(services["mill"], {"do": "seen"})
    assert rows - rows_before == ROWS - 1


@both
@pytest.mark.parametrize(("bad", "kind"), [(5, InvalidRequest), (LONG, InputTooLong)], ids=["number", "long"])
def test_one_bad_text_of_64_fails_alone(
    client: Client, services: dict[str, str], outcomes: Outcomes, bad: object, kind: type[MillstreamError]
) -> None:
    texts: list[object] = [f"text {n}" for n in range(ROWS)]
    texts[BAD] = bad

    got = outcomes(client, services["short"], texts)

    assert type(got[BAD]) is kind
    assert [each for n, each in enumerate(got) if n != BAD] == [each for n, each in enumerate(texts) if n != BAD]


def test_a_batch_that_is_too_large_for_the_memory_is_cut_and_the_next_begins_with_what_fits(
    client: Client, services: dict[str, str]
) -> None:
    payloads: list[object] = [{"n": n} for n in range(ROWS)]

    first = in_one_call(client, services["narrow"], payloads)
    sizes = client.call(services["narrow"], {"do": "seen"})
    second = in_one_call(client, services["narrow"], payloads)
    later = client.call(services["narrow"], {"do": "seen"})[len(sizes) :]

    assert first == second == [2 * n for n in range(ROWS)]
    assert (sizes[0], sum(sizes) <= 3 * ROWS) == (ROWS, True)
    assert later == [FITS] * (ROWS // FITS)


# -- the processes that it starts ----------------------------------------------------------------------------------


def test_a_program_that_a_handler_starts_reads_an_empty_standard_input(
    client: Client, services: dict[str, str]
) -> None:
    assert client.call(services["standard_input"], None) == ""


def test_a_program_that_a_handler_starts_inherits_nothing_of_the_workers_own(
    client: Client, services: dict[str, str]
) -> None:
    (listing,) = eval(client.call(services["inherited"], None))

    assert re.fullmatch(r"/proc/\d+/fd", listing)


def test_a_process_that_a_handler_forks_can_be_terminated_and_the_worker_goes_on(
    client: Client, connection: Connection, services: dict[str, str]
) -> None:
    before = pids(connection, services["terminated"])

    assert client.submit(services["terminated"], [None, None]).result(LONG_S) == [-signal.SIGTERM] * 2
    assert client.call(services["terminated"], None) == -signal.SIGTERM
    assert pids(connection, services["terminated"]) == before


def test_a_batch_size_that_is_pushed_is_that_of_the_next_batches(
    client: Client, connection: Connection, services: dict[str, str]
) -> None:
    registry, service = Registry(connection), services["sizes"]
    assert client.submit(service, [0] * 4).result() == [4] * 4

    registered = registry.read(service)
    larger = registered.runtime.model_copy(update={"batch_size": ROWS})
    registry.push([registered.model_copy(update={"runtime": larger})], replace=True)

    eventually(lambda: client.submit(service, [0] * ROWS).result() == [ROWS] * ROWS)


# -- any JSON, by every verb ---------------------------------------------------------------------------------------


VALUES: list[object] = [None, True, -7, 0.5, "", "水车 🌊", [], {}, [1, [2, {"a": None}]], {"": {"深": ["x"]}}]


def test_payloads_and_results_are_any_json(client: Client, services: dict[str, str]) -> None:
    assert client.submit(services["echo"], VALUES).result() == VALUES  # type: ignore[arg-type]
    assert list(client.map(services["echo"], VALUES, window=4)) == VALUES  # type: ignore[arg-type]
    detached = client.submit_detached(services["echo"], VALUES)  # type: ignore[arg-type]
    assert client.job(detached.id).result(LONG_S) == VALUES
    assert [client.call(services["echo"], value) for value in VALUES] == VALUES


def test_the_async_client_calls_too(server: EmbeddedServer, services: dict[str, str]) -> None:
    async def ask() -> list[object]:
        async with AsyncClient(server.url) as client:
            return list(await asyncio.gather(*(client.call(services["echo"], value) for value in VALUES)))

    assert asyncio.run(ask()) == VALUES


def test_a_payload_is_what_it_was_when_its_call_was_made(client: Client, services: dict[str, str]) -> None:
    payloads: list[Json] = [{"n": n} for n in range(1_000)]

    handle = client.submit(services["echo"], payloads)
    for payload in payloads:
        payload.clear()  # type: ignore[union-attr]

    assert handle.result(LONG_S) == [{"n": n} for n in range(1_000)]


def test_vectors_come_as_an_array(client: Client, services: dict[str, str]) -> None:
    vectors = client.submit(services["vectors"], [1, 2, 3]).result()

    assert isinstance(vectors, Embeddings)
    assert vectors.tolist() == [[1, 1], [2, 2], [3, 3]]
    assert client.embed(["4"], service=services["vectors"]).tolist() == [[4, 4]]
    assert client.call(services["vectors"], 5).tolist() == [5, 5]


def test_a_vector_among_others_that_is_none_costs_them_nothing(client: Client, services: dict[str, str]) -> None:
    got = client.submit(services["vectors"], [*range(BAD), None, *range(BAD + 1, ROWS)]).outcomes()

    assert type(got[BAD]) is ModelFailed
    assert [np.asarray(each).tolist() for n, each in enumerate(got) if n != BAD] == [
        [n, n] for n in range(ROWS) if n != BAD
    ]


def test_options_are_refused_before_anything_is_sent(client: Client, services: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="takes no options"):
        client.submit(services["echo"], ["a"], colour="red")
    with pytest.raises(InvalidRequest, match="a list of payloads"):
        client.submit(services["echo"], {"a": 1})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="not dense vectors"):
        client.embed(["a"], service=services["echo"])
