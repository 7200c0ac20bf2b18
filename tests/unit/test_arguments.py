"""Arguments as programs have them: NumPy's numbers count as Python's, and no number of seconds is not-a-number."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from millstream.broker.config.load import given_service
from millstream.broker.contract.codec import encode_value
from millstream.broker.contract.embedding import EmbedOptions
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.scalars import plain
from millstream.client import AsyncClient, Client
from millstream.client.call_options import CallOptions
from millstream.client.testing import AsyncFakeClient, FakeClient

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("held", "value"),
    [
        (np.int64(8), 8),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array("a"), "a"),
        (np.array(3), 3),
        (torch.tensor(3), 3),
        (torch.tensor(True), True),
    ],
)
def test_a_scalar_of_an_array_library_is_the_value_it_holds(held: object, value: object) -> None:
    assert (plain(held), type(plain(held))) == (value, type(value))


@pytest.mark.parametrize("kept", ["a", 3, None, [1], np.array([1]), object(), np.array([])])
def test_anything_else_stays_as_it_is(kept: object) -> None:
    assert plain(kept) is kept


def test_a_call_takes_numbers_and_texts_of_numpy_as_pythons() -> None:
    fake: Any = FakeClient()

    assert fake.embed(np.array("a")).shape == (384,)
    assert fake.embed(np.array(["a", "b"])).shape == (2, 384)
    assert fake.embed("a", dimensions=np.int64(8), normalize=np.bool_(True)).shape == (8,)
    assert fake.embed("a", timeout=np.float32(5), wait=np.bool_(False)).shape == (384,)
    assert len(fake.rerank(np.array("q"), ["a", "b"], top_n=np.int32(1))) == 1
    assert len(list(fake.map("embed", ["a", "b"], window=np.int64(2)))) == 2
    assert fake.submit("embed", ["a"], dimensions=np.array(8)).result(np.float32(1)).shape == (1, 8)
    assert [type(call.opts.timeout) for call in fake.calls if call.opts.timeout] == [float]


def test_the_async_client_takes_them_too() -> None:
    async def called() -> tuple[int, ...]:
        fake: Any = AsyncFakeClient()
        handle = await fake.submit("embed", ["a"], dimensions=np.int64(8))
        await handle.result(np.float32(1))
        vectors = await fake.embed(np.array("a"), dimensions=np.int64(8), timeout=np.float64(5))
        return tuple(vectors.shape)

    assert asyncio.run(called()) == (8,)


def test_a_payload_may_hold_scalars_of_numpy() -> None:
    fake = FakeClient(handlers={"double": lambda payloads: [2 * each["n"] for each in payloads]})

    assert fake.call("double", {"n": np.int64(4)}) == 8
    assert encode_value([np.float32(0.5), {"b": np.bool_(False)}]) == '[0.5,{"b":false}]'


@pytest.mark.parametrize("value", [np.float32("nan"), np.array([1, 2]), object()])
def test_what_json_cannot_carry_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        encode_value({"n": value})


def test_limits_of_a_served_function_may_be_numpys() -> None:
    runtime = given_service("s", {"batch_size": np.int64(4), "total_timeout": np.float32(2)}).runtime

    assert (runtime.batch_size, runtime.total_timeout) == (4, 2.0)


Use = Callable[[Any], object]
USES: list[Use] = [
    lambda fake: fake.embed("a", timeout=math.nan),
    lambda fake: fake.embed("a", timeout=np.float64("nan")),
    lambda fake: fake.embed("a", timeout="5"),
    lambda fake: fake.embed("a", timeout=True),
    lambda fake: fake.embed(np.array(3)),
    lambda fake: fake.submit("embed", np.array("a")),
    lambda fake: fake.call("embed", "a", timeout=math.nan),
    lambda fake: fake.submit_detached("embed", ["a"], timeout=math.nan),
    lambda fake: fake.submit("embed", ["a"]).result(math.nan),
    lambda fake: fake.submit("embed", ["a"]).outcomes(math.nan),
    lambda fake: fake.submit("embed", ["a"]).wait("soon"),
    lambda fake: fake.submit("embed", ["a"]).cancel(math.nan),
    lambda fake: fake.submit_detached("embed", ["a"]).result(math.nan),
    lambda fake: list(fake.map("embed", ["a"], window=math.nan)),
    lambda fake: list(fake.map("embed", ["a"], window="2")),
    lambda fake: list(fake.map("embed", ["a"], window=2.5)),
    lambda fake: fake.rerank("q", ["a"], top_n=math.nan),
    lambda fake: fake.job(3),
]


@pytest.mark.parametrize("use", USES)
def test_what_is_no_such_number_is_an_invalid_request(use: Use) -> None:
    fake: Any = FakeClient()

    with pytest.raises(InvalidRequest):
        use(fake)


METHODS = ("embed", "rerank", "submit", "call", "map", "submit_detached", "job", "local", "__init__")


def parameters(client: type, method: str) -> dict[str, tuple[object, object, object]]:
    """Its parameters: kind, default and annotation by name."""
    found = inspect.signature(getattr(client, method)).parameters.values()
    return {each.name: (each.kind, each.default, each.annotation) for each in found}


@pytest.mark.parametrize("method", METHODS)
def test_the_async_client_has_the_parameters_and_defaults_of_the_blocking_one(method: str) -> None:
    blocking, awaited = parameters(Client, method), parameters(AsyncClient, method)

    if method == "map":
        kind, default, annotation = blocking["inputs"]
        blocking["inputs"] = kind, default, f"{annotation} | AsyncIterable[Json]"
    assert list(blocking.items()) == list(awaited.items())


@pytest.mark.parametrize("method", ["embed", "rerank", "submit", "call", "map", "submit_detached"])
def test_options_of_a_method_have_the_defaults_of_call_and_embed_options(method: str) -> None:
    defaults: dict[str, object] = {**EmbedOptions._field_defaults, **CallOptions._field_defaults}
    if method in ("map", "submit_detached"):
        defaults["priority"] = "batch"
    del defaults["options"]

    given = {name: default for name, (_, default, _) in parameters(Client, method).items() if name in defaults}

    assert given == {name: defaults[name] for name in given}
    assert {"priority", "tenant"} <= given.keys()
