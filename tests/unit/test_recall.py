"""A client looks up each text once, and leaves a server alone that did not answer."""

from __future__ import annotations

from collections.abc import Sequence

import fakeredis
import pytest
import redis

from millstream.broker.cache import Cached, Recipe, encode
from millstream.broker.connection import Connection
from millstream.broker.keys import ServiceKeys
from millstream.broker.registry import Registry
from millstream.client import recall as module
from millstream.client.recall import Recall

RECIPE = Recipe("weights", "echo", "none", None)


class Asked(fakeredis.FakeRedis):
    """Has an answer for "a"; remembers how many keys each MGET had, and is away when told to be."""

    def __init__(self) -> None:
        super().__init__(server=fakeredis.FakeServer(), protocol=2)
        (name,) = RECIPE.digests(["a"], {})
        self.set(ServiceKeys("echo").cache(name), encode(Cached("A")))
        self.asked: list[int] = []
        self.away = False

    def mget(self, keys: Sequence[str], *more: str) -> list[bytes | None]:  # type: ignore[override]
        self.asked.append(len(keys))
        if self.away:
            raise redis.TimeoutError("away")
        return super().mget(keys, *more)  # type: ignore[return-value]


@pytest.fixture
def server() -> Asked:
    return Asked()


@pytest.fixture
def recall(server: Asked, monkeypatch: pytest.MonkeyPatch) -> Recall:
    monkeypatch.setattr(Connection, "within", lambda connection, timeout_s: server)
    connection = Connection("redis://nowhere")
    return Recall(connection, Registry(connection))


def test_every_row_with_a_kept_text_has_its_answer_and_each_text_is_asked_for_once(
    recall: Recall, server: Asked
) -> None:
    hits = recall.rows("echo", RECIPE, {0: "b", 2: "a", 3: "b", 5: "a"}, {})

    assert hits == dict.fromkeys((2, 5), Cached("A", fingerprint="weights"))
    assert server.asked == [2]


def test_after_a_look_up_that_failed_none_is_tried_for_a_moment(
    recall: Recall, server: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("millstream.client.recall.time.monotonic", lambda: now)
    server.away = True
    assert recall.rows("echo", RECIPE, {0: "a"}, {}) == {}
    server.away = False

    assert recall.rows("echo", RECIPE, {0: "a"}, {}) == {}
    assert server.asked == [1]
    now += module.LOOK_UP_S
    assert recall.rows("echo", RECIPE, {0: "a"}, {}) == {0: Cached("A", fingerprint="weights")}
