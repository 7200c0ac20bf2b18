"""Texts of a real worker: cut at their time limits with what they have, and displaced by more urgent ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
from workers import LONG_S, remove, working

from millstream.broker.config.spec import ModelSpec, PriorityName, Runtime, ServiceSpec
from millstream.broker.contract.errors import DeadlineExceeded
from millstream.broker.server.embedded import EmbeddedServer
from millstream.client import Client, TextStream

STEP_S = 0.02

USERS: dict[str, object] = {
    "batch_size": 4,
    "batch_timeout": 0.05,
    "max_queue_size": 50,
    "queue_timeout": 0.2,
    "inference_timeout": 2.0,
    "total_timeout": 3.0,
    "rate_limit": 10,
}
"""A user's own limits of a service that generates texts."""


def texts(name: str, **runtime: object) -> ServiceSpec:
    model = ModelSpec(type="echo-stream", model_name=f"sleep:{STEP_S}")
    return ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime.model_validate(runtime))


def words(count: int, letter: str = "w") -> str:
    return " ".join(f"{letter}{at}" for at in range(count))


@pytest.fixture(scope="module")
def users(server: EmbeddedServer) -> Iterator[str]:
    """A service with the user's limits, and one worker."""
    with working(server.url, texts("test-users-texts", **USERS)):
        yield "test-users-texts"
    remove(server.url, "test-users-texts")


@pytest.fixture(scope="module")
def busy(server: EmbeddedServer) -> Iterator[str]:
    """A service with two slots, and one worker."""
    with working(server.url, texts("test-busy-texts", batch_size=2)):
        yield "test-busy-texts"
    remove(server.url, "test-busy-texts")


def test_with_the_users_limits_a_text_is_cut_at_its_inference_timeout(client: Client, users: str) -> None:
    text, began = words(1000), time.monotonic()

    stream = client.stream(users, text)
    pieces = "".join(stream)
    seconds = time.monotonic() - began

    assert stream.finish_reason == "deadline"
    assert text.startswith(pieces)
    assert len(pieces.split()) > 20
    assert 1.9 < seconds < 3.0


def running_texts(
    client: Client, service: str, texts: Sequence[str], priority: PriorityName = "normal"
) -> list[TextStream]:
    """Streams of texts that have begun."""
    streams = [client.stream(service, text, priority=priority) for text in texts]
    for stream in streams:
        next(stream)
    return streams


def rest(stream: TextStream) -> str:
    """The whole text, after its end."""
    for _ in stream:
        pass
    return stream.text


def test_with_the_users_limits_texts_in_all_slots_end_and_what_waits_longer_than_queue_timeout_expires(
    client: Client, users: str
) -> None:
    text = words(1000)
    running = running_texts(client, users, [text] * 4)
    late = client.submit(users, [words(3)])

    with pytest.raises(DeadlineExceeded) as error:
        late.result(LONG_S)
    parts = [rest(stream) for stream in running]

    assert error.value.phase == "queue"
    assert all(text.startswith(part) for part in parts)
    assert [stream.finish_reason for stream in running] == ["deadline"] * 4


def test_at_the_timeout_of_the_call_it_gets_the_text_so_far(client: Client, busy: str) -> None:
    text, began = words(1000), time.monotonic()

    stream = client.stream(busy, text, timeout=1.0)
    pieces = "".join(stream)

    assert stream.finish_reason == "deadline"
    assert text.startswith(pieces)
    assert 0.9 < time.monotonic() - began < 1.6


def test_a_realtime_text_takes_a_slot_of_batch_texts_which_go_on_later(client: Client, busy: str) -> None:
    long = [words(200, letter) for letter in "ab"]
    running = running_texts(client, busy, long, "batch")

    began = time.monotonic()
    (urgent,) = client.submit(busy, [words(5)], priority="realtime").result(LONG_S)
    seconds = time.monotonic() - began
    reasons = [stream.finish_reason for stream in running]

    assert cast(dict[str, Any], urgent)["text"] == words(5)
    # Each batch text takes 4 s.
    assert seconds < 1.5
    assert reasons == [None, None]
    assert [rest(stream) for stream in running] == long


def test_a_normal_text_takes_a_slot_of_batch_texts(client: Client, busy: str) -> None:
    running = running_texts(client, busy, [words(200)] * 2, "batch")
    waiting = client.submit(busy, [words(200)], priority="batch")

    began = time.monotonic()
    client.submit(busy, [words(5)], priority="normal").result(LONG_S)

    assert time.monotonic() - began < 1.5
    assert not waiting.ready
    waiting.cancel()
    for stream in running:
        stream.close()


def test_a_cancelled_text_frees_its_slot(client: Client, busy: str) -> None:
    running = running_texts(client, busy, [words(1000)] * 2)
    waiting = client.submit(busy, [words(5)])

    running[0].close()
    # The worker reads it with its next heartbeat.
    value = cast(dict[str, Any], waiting.result(5.0)[0])
    running[1].close()

    assert value["text"] == words(5)
