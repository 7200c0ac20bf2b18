"""Streams of text survive any order of events, on fakeredis."""

from __future__ import annotations

import secrets

import fakeredis
import pytest
from contracts.queue import Queue
from emit_machine import EmitMachine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue import streams


def test_text_is_emitted_once_and_in_order_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_UNREAD_DELTAS", 4)

    class OnFakeRedis(EmitMachine):
        def __init__(self) -> None:
            client = fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2)
            queue = Queue(client, ServiceKeys(f"test-{secrets.token_hex(6)}"))
            queue.open()
            super().__init__(queue)

    effort = settings(
        max_examples=20,
        stateful_step_count=30,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(OnFakeRedis, settings=effort)
