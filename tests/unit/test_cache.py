"""An answer's name changes with all that makes it; what is read is what was written, or a miss; faults cost nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import fakeredis
import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.codec import decode_inputs, encode_inputs
from millstream.broker.contract.job import Json
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue import cache as module
from millstream.broker.queue.cache import CHUNK, Cache, Cached, CacheKey, decode, encode
from millstream.broker.queue.streams import LONGEST_MS

KEYS = ServiceKeys("embed")
CACHE_KEY = CacheKey("weights float32 384", "embed", "none", 256)

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
recipes = st.builds(CacheKey, words, words, words, st.none() | st.integers(1, 9))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
options = st.dictionaries(words, json_values, max_size=3)


def digest(key: CacheKey, text: str, given_options: dict[str, Json]) -> str:
    (name,) = key.digests([text], given_options)
    return name


# -- names -----------------------------------------------------------------------------------------------------------


@given(recipes, words, options, recipes, words, options)
def test_two_answers_have_one_name_only_where_all_that_makes_them_is_the_same(
    key: CacheKey,
    text: str,
    given_options: dict[str, Json],
    other: CacheKey,
    text2: str,
    options2: dict[str, Json],
) -> None:
    same = (key, text, repr(given_options)) == (other, text2, repr(options2))

    # 1 and 1.0 and True are one number to Python, and three to a model.
    assert digest(key, text, given_options) == digest(other, text2, options2) or not same
    assert digest(key, text, given_options) != digest(other, text2, given_options) or (key, text) == (
        other,
        text2,
    )


@given(recipes, words, options, words)
def test_each_part_alone_changes_the_name(key: CacheKey, text: str, given_options: dict[str, Json], more: str) -> None:
    names = {
        digest(key, text, given_options),
        digest(replace(key, fingerprint=key.fingerprint + "'"), text, given_options),
        digest(replace(key, op=key.op + "'"), text, given_options),
        digest(replace(key, truncate=key.truncate + "'"), text, given_options),
        digest(replace(key, max_length=(key.max_length or 9) + 1), text, given_options),
        digest(key, text, {**given_options, "another": more}),
        digest(key, f"{text}\0{more}", given_options),
    }

    assert len(names) == 7


def test_what_moves_from_one_part_to_the_next_changes_the_name() -> None:
    assert digest(replace(CACHE_KEY, fingerprint="ab", op="c"), "d", {}) != digest(
        replace(CACHE_KEY, fingerprint="a", op="bc"), "d", {}
    )
    assert digest(replace(CACHE_KEY, truncate="none\0"), "d", {}) != digest(CACHE_KEY, "\0d", {})


@given(st.lists(words, min_size=1, max_size=4), st.dictionaries(words | st.integers(), json_values, max_size=3))
def test_a_worker_names_what_it_read_as_the_caller_names_what_it_sent(
    texts: list[str], given_options: dict[str, Json]
) -> None:
    read, options_read = decode_inputs(encode_inputs(texts, given_options), len(texts))

    assert CACHE_KEY.digests(cast(list[str], read), options_read) == CACHE_KEY.digests(texts, given_options)


def test_the_order_of_options_does_not_matter() -> None:
    assert digest(CACHE_KEY, "a", {"x": 1, "y": {"b": 1, "a": 2}}) == digest(
        CACHE_KEY, "a", {"y": {"a": 2, "b": 1}, "x": 1}
    )


def test_the_settings_of_a_service_that_change_an_answer_are_in_its_recipe() -> None:
    model = ModelSpec(type="embedding", model_name="m", max_length=7)
    spec = ServiceSpec(name="embed", model=model, model_ref="m", runtime=Runtime(truncate="end"))

    assert CacheKey.of(spec, "weights", "embed") == CacheKey("weights", "embed", "end", 7)


# -- values ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9), st.booleans())
def test_a_vector_is_read_bit_by_bit_as_it_was_written(numbers: list[float], truncated: bool) -> None:
    vector = np.array(numbers, dtype=np.float32)

    read = decode(encode(Cached(vector, truncated)))

    assert read is not None
    assert isinstance(read.result, np.ndarray)
    assert (read.result.tobytes(), read.truncated) == (vector.tobytes(), truncated)
    assert read.result.flags.aligned


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(np.uint8)])
def test_a_vector_that_was_asked_for_in_another_encoding_is_kept_in_it(dtype: np.dtype[np.float16 | np.uint8]) -> None:
    vector = np.array([1, 0, 7], dtype)

    read = decode(encode(Cached(vector, True)))

    assert read is not None
    assert isinstance(read.result, np.ndarray)
    assert (read.result.dtype, read.result.tolist(), read.truncated) == (dtype, [1, 0, 7], True)


@given(json_values, st.booleans())
def test_a_value_is_read_as_it_was_written(value: Json, truncated: bool) -> None:
    assert decode(encode(Cached(value, truncated))) == Cached(value, truncated)


@given(st.binary(max_size=40))
def test_any_other_bytes_are_an_answer_or_a_miss_and_never_a_fault(blob: bytes) -> None:
    read = decode(blob)

    assert read is None or isinstance(read.result, np.ndarray | str | int | float | bool | None | list | dict)


@pytest.mark.parametrize(
    "blob",
    [
        *(None, b"", b"\0", b"\0abc", b"\x04abcd", b"\xffabcd", b"\2", b"\2{", b"\2\xff", b"\x08abc", b"\x18ab"),
        *(b"\2NaN", b'\2{"a":[Infinity]}', b"\0" + np.float32(np.nan).tobytes(), b"\0" + np.float32(np.inf).tobytes()),
    ],
)
def test_what_nobody_could_have_written_is_a_miss(blob: bytes | None) -> None:
    assert decode(blob) is None


# -- reading and writing ---------------------------------------------------------------------------------------------


class Memory(fakeredis.FakeRedis):
    """Says of its memory what it is told to."""

    used, most, host, asked = 0, 0, 1_000_000, 0

    def info(self, section: str | None = None, *args: str, **kwargs: object) -> dict[str, int]:
        self.asked += 1
        said = {"used_memory": self.used, "maxmemory": self.most, "total_system_memory": self.host}
        return {name: number for name, number in said.items() if number or name != "total_system_memory"}


@pytest.fixture
def server() -> Memory:
    return Memory(server=fakeredis.FakeServer(), protocol=2)


def test_what_was_kept_is_found_in_the_order_asked_for(server: Memory) -> None:
    cache = Cache(server, KEYS)
    names = [f"{number:032x}" for number in range(2 * CHUNK + 1)]
    kept = [(name, encode(Cached(at))) for at, name in enumerate(names) if at % 3]

    cache.keep(kept, 60.0)

    assert cache.look_up(names) == [Cached(at) if at % 3 else None for at in range(len(names))]
    assert cache.look_up([]) == []


@pytest.mark.parametrize(("ttl_s", "ttl_ms"), [(1.5, 1_500), (0.0001, 1), (float("inf"), LONGEST_MS)])
def test_what_is_kept_has_a_life(server: Memory, ttl_s: float, ttl_ms: int) -> None:
    Cache(server, KEYS).keep([("a", b"\2null")], ttl_s)

    assert ttl_ms - 1_000 <= server.pttl(KEYS.cache("a")) <= ttl_ms or ttl_ms == 1


def test_a_server_that_is_gone_has_no_answers_and_takes_none(server: Memory) -> None:
    cache = Cache(redis.Redis(unix_socket_path="/nowhere/at/all"), KEYS)

    assert cache.look_up(["a", "b"]) == [None, None]
    cache.keep([("a", b"\2null")], 60.0)

    assert cache.faults == 2
    assert isinstance(cache.fault, redis.ConnectionError)


def test_nothing_is_kept_in_the_last_quarter_of_the_servers_memory(
    server: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    cache = Cache(server, KEYS)
    server.most = 1_000

    for server.used, name in [(749, "fits"), (750, "full"), (10, "again")]:
        cache.keep([(name, b"\2null")], 60.0)

    assert cache.look_up(["fits", "full", "again"]) == [Cached(None), None, Cached(None)]


@pytest.mark.parametrize(("host", "most"), [(1_000, 500), (0, 1024**3)])
def test_without_a_limit_of_the_server_the_cache_has_one_all_the_same(
    server: Memory, monkeypatch: pytest.MonkeyPatch, host: int, most: int
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    cache = Cache(server, KEYS)
    server.host = host

    for server.used, name in [(most - 1, "fits"), (most, "full"), (10, "again")]:
        cache.keep([(name, b"\2null")], 60.0)

    assert cache.look_up(["fits", "full", "again"]) == [Cached(None), None, Cached(None)]


def test_the_servers_memory_is_looked_at_once_in_a_while(server: Memory) -> None:
    cache = Cache(server, KEYS)

    for number in range(5):
        cache.keep([(str(number), b"\2null")], 60.0)

    assert server.asked == 1
