"""A worker keeps good answers under names of its own making, and only while its service has a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import fakeredis
import numpy as np
import pytest

from millstream.broker.contract.errors import ModelFailed
from millstream.broker.contract.job import Address, Json, Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.cache import Cache, Cached, CacheKey
from millstream.worker.intake.cache_writer import CacheWriter
from millstream.worker.intake.settler import Finished

CACHE_KEY = CacheKey("weights", "echo", "none", None)


class Kept(Cache):
    """Remembers what it is asked to keep, decoded by its name."""

    def __init__(self) -> None:
        super().__init__(fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2), ServiceKeys("echo"))
        self._room, self._looked_at = True, float("inf")

    def of(self, *texts: str) -> list[Cached | None]:
        return self.look_up(CACHE_KEY.digests(texts, {}))


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def writer(kept: Kept) -> CacheWriter:
    writer = CacheWriter(kept, CACHE_KEY)
    writer.ttl_s = 60.0
    return writer


def finished(writer: CacheWriter, texts: Sequence[Json], reply: Reply) -> Finished:
    return Finished(Address("2:1-1"), reply, digests=writer.digests(texts, {}))


def keep(writer: CacheWriter, finished: Finished) -> None:
    writer.write(writer.encoded(finished))


def test_rows_without_an_error_are_kept_each_under_its_own_text(writer: CacheWriter, kept: Kept) -> None:
    reply = Reply(values=["A", "C"], errors={1: ModelFailed("NaN")}, truncated=(2,))

    keep(writer, finished(writer, ["a", "b", "c"], reply))

    assert kept.of("a", "b", "c") == [Cached("A"), None, Cached("C", truncated=True)]


def test_vectors_are_kept_as_vectors(writer: CacheWriter, kept: Kept) -> None:
    keep(writer, finished(writer, ["a", "b"], Reply(vectors=np.array([[1, 2], [3, 4]], np.float32))))

    results = [np.asarray(each.result).tolist() for each in kept.of("a", "b") if each]
    assert results == [[1, 2], [3, 4]]


def test_an_error_of_the_whole_job_is_not_kept(writer: CacheWriter, kept: Kept) -> None:
    keep(writer, finished(writer, ["a"], Reply(error=ModelFailed("no"))))

    assert kept.of("a") == [None]


class Hostile(dict[str, Json]):
    """A result with code of its own, which runs as it is encoded."""

    def items(self) -> NoReturn:
        raise SystemExit("mine")


@pytest.mark.parametrize("value", [object(), Hostile(a=1)], ids=["object", "its own code"])
def test_what_cannot_be_written_is_not_kept_and_its_neighbours_are(
    writer: CacheWriter, kept: Kept, value: Json
) -> None:
    values: list[Json] = [value, "B"]

    keep(writer, finished(writer, ["a", "b"], Reply(values=values)))

    assert kept.of("a", "b") == [None, Cached("B")]


def test_what_is_no_text_has_no_name(writer: CacheWriter, kept: Kept) -> None:
    keep(writer, finished(writer, [5, "b"], Reply(values=[5, "B"])))

    assert kept.of("5", "", "b") == [None, None, Cached("B")]


def test_without_a_cache_rows_are_neither_named_nor_kept(writer: CacheWriter, kept: Kept) -> None:
    named = finished(writer, ["a"], Reply(values=["A"]))
    writer.ttl_s = None

    keep(writer, named)

    assert writer.digests(["a"], {}) == ()
    assert kept.of("a") == [None]


def test_a_cache_that_fails_is_told_of_once(writer: CacheWriter, kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    kept._client = fakeredis.FakeRedis(server=fakeredis.FakeServer(), connected=False)
    kept._client.connection_pool.connection_kwargs["server"].connected = False

    for text in ("a", "b"):
        keep(writer, finished(writer, [text], Reply(values=["A"])))

    assert [record.message.partition(":")[0] for record in caplog.records] == ["answers cannot be written to the cache"]
