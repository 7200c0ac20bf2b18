"""A client looks up each text once, and leaves a server alone that did not answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import fakeredis
import pytest
import redis
from support import eventually

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.cache import Cached, CacheKey, encode
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection
from millstream.client import cache_hits
from millstream.client import cache_reader as module
from millstream.client.cache_reader import CacheReader

CACHE_KEY = CacheKey("weights", "echo", "none", None)
HIT = Cached("A", fingerprint="weights")


class Asked(fakeredis.FakeRedis):
    """Has an answer for "a"; remembers how many keys each MGET had, and is away when told to be."""

    def __init__(self) -> None:
        super().__init__(server=fakeredis.FakeServer(), protocol=2)
        (name,) = CACHE_KEY.digests(["a"], {})
        self.set(ServiceKeys("echo").cache(name), encode(Cached("A")))
        self.asked: list[int] = []
        self.away = self.broken = False
        self.go = threading.Event()
        self.go.set()

    def mget(self, keys: Sequence[str], *more: str) -> list[bytes | None]:  # type: ignore[override]
        self.asked.append(len(keys))
        assert self.go.wait(10.0)
        if self.broken:
            raise ValueError("broken")
        if self.away:
            raise redis.TimeoutError("away")
        return super().mget(keys, *more)  # type: ignore[return-value]


@pytest.fixture
def server() -> Asked:
    return Asked()


@pytest.fixture
def reader(server: Asked, monkeypatch: pytest.MonkeyPatch) -> Iterator[CacheReader]:
    monkeypatch.setattr(cache_hits, "EVERY_S", 0.01)
    monkeypatch.setattr(Connection, "within", lambda connection, timeout_s: server)
    connection = Connection("redis://nowhere")
    opened = CacheReader(connection, Registry(connection))
    yield opened
    opened.close()


def test_every_row_with_a_kept_text_has_its_answer_and_each_text_is_asked_for_once(
    reader: CacheReader, server: Asked
) -> None:
    hits = reader.read("echo", CACHE_KEY, {0: "b", 2: "a", 3: "b", 5: "a"}, {})

    assert hits == dict.fromkeys((2, 5), HIT)
    assert server.asked == [2]


def test_after_a_look_up_that_failed_none_is_tried_for_a_moment(
    reader: CacheReader, server: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("millstream.client.cache_reader.time.monotonic", lambda: now)
    server.away = True
    assert reader.read("echo", CACHE_KEY, {0: "a"}, {}) == {}
    server.away = False

    assert reader.read("echo", CACHE_KEY, {0: "a"}, {}) == {}
    assert server.asked == [1]
    now += module.LOOK_UP_S
    assert reader.read("echo", CACHE_KEY, {0: "a"}, {}) == {0: HIT}


class Loops:
    """Asks as event loops do, and notes each answer in the order of their coming."""

    def __init__(self, reader: CacheReader) -> None:
        self._reader = reader
        self.answers: list[tuple[str, Mapping[int, Cached]]] = []

    def ask(self, name: str, texts: Mapping[int, str], service: str = "echo") -> None:
        self._reader.read_soon(service, CACHE_KEY, texts, {}, lambda hits: self.answers.append((name, hits)))

    def answered(self, count: int) -> list[tuple[str, Mapping[int, Cached]]]:
        eventually(lambda: len(self.answers) >= count)
        return self.answers


@pytest.fixture
def loops(reader: CacheReader) -> Loops:
    return Loops(reader)


def test_what_many_calls_ask_for_while_the_server_is_busy_is_one_command(loops: Loops, server: Asked) -> None:
    server.go.clear()
    loops.ask("first", {0: "a"})
    eventually(lambda: server.asked)
    for number in range(50):
        loops.ask(str(number), {0: "a", 7: f"b{number}"})
    server.go.set()

    assert [hits for _, hits in loops.answered(51)] == [{0: HIT}] * 51
    assert server.asked == [1, 100]


def test_a_long_list_does_not_keep_the_others_waiting(
    loops: Loops, server: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    server.go.clear()
    loops.ask("first", {0: "a"})
    eventually(lambda: server.asked)
    loops.ask("long", {row: f"text {row}" if row % 8 else "a" for row in range(100)})
    loops.ask("short", {0: "a"})
    server.go.set()

    answers = loops.answered(3)
    assert [name for name, _ in answers] == ["first", "short", "long"]
    assert answers[2][1] == dict.fromkeys(range(0, 100, 8), HIT)
    assert max(server.asked) == 10


def test_services_are_asked_for_each_by_itself_and_in_order(loops: Loops, server: Asked) -> None:
    server.go.clear()
    loops.ask("first", {0: "a"})
    eventually(lambda: server.asked)
    for name, service in (("b", "other"), ("c", "echo"), ("d", "other")):
        loops.ask(name, {0: "a"}, service)
    server.go.set()

    assert loops.answered(4) == [
        ("first", {0: HIT}),
        ("b", {}),
        ("d", {}),
        ("c", {0: HIT}),
    ]
    assert server.asked == [1, 2, 1]


def test_a_server_that_is_away_has_nothing_and_is_asked_once(loops: Loops, server: Asked) -> None:
    server.go.clear()
    server.away = True
    for number in range(5):
        loops.ask(str(number), {0: "a"})
        eventually(lambda: server.asked)
    server.go.set()

    assert [hits for _, hits in loops.answered(5)] == [{}] * 5
    assert server.asked == [1]


def test_a_call_that_raises_and_a_look_up_that_breaks_cost_no_other_call_its_answer(
    loops: Loops, reader: CacheReader, server: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    reader.read_soon("echo", CACHE_KEY, {0: "a"}, {}, lambda hits: 1 / 0)
    reader.read_soon("echo", CACHE_KEY, {0: 5}, {}, lambda hits: None)  # type: ignore[dict-item]
    loops.ask("whole", {0: "a"})
    assert loops.answered(1) == [("whole", {0: HIT})]

    server.broken = True
    loops.ask("broken", {0: "a"})
    assert loops.answered(2)[1] == ("broken", {})
    assert "division by zero" in caplog.text


def test_the_thread_ends_when_nothing_is_asked_and_begins_again(
    loops: Loops, reader: CacheReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.01)
    loops.ask("first", {0: "a"})
    loops.answered(1)
    thread = reader._gatherer
    assert thread is not None
    eventually(lambda: not thread.is_alive())

    loops.ask("second", {0: "a"})

    assert loops.answered(2)[1] == ("second", {0: HIT})


def test_where_no_thread_can_start_the_rows_are_computed(
    loops: Loops, reader: CacheReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", cannot)
        loops.ask("first", {0: "a"})
    assert loops.answers == [("first", {})]

    loops.ask("second", {0: "a"})
    assert loops.answered(2)[1] == ("second", {0: HIT})


def test_found_rows_are_added_to_the_metrics_of_their_service(reader: CacheReader, server: Asked) -> None:
    reader.read("echo", CACHE_KEY, {0: "a", 1: "b", 2: "a"}, {})
    done = threading.Event()
    reader.read_soon("echo", CACHE_KEY, {0: "a", 1: "b"}, {}, lambda found: done.set())
    assert done.wait(10.0)

    eventually(lambda: cached(server) == 3)

    assert server.ttl(ServiceKeys("echo").metrics()) > 0


def test_rows_found_last_are_added_when_the_client_is_closed(reader: CacheReader, server: Asked) -> None:
    reader.read("echo", CACHE_KEY, {0: "a"}, {})

    reader.close()

    assert cached(server) == 1


def test_no_call_fails_because_its_hits_cannot_be_counted(
    reader: CacheReader, server: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object) -> int:
        raise redis.ConnectionError("away")

    monkeypatch.setattr(server, "hincrby", away)
    reader.read("echo", CACHE_KEY, {0: "a"}, {})

    reader.close()

    assert cached(server) == 0


def cached(server: Asked) -> int:
    return int(server.hget(ServiceKeys("echo").metrics(), "cached") or 0)
