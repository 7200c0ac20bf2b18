"""A worker's idea of the server's time."""

from __future__ import annotations

import time

import pytest

from millstream.worker.clock import ServerClock


def test_an_answer_that_lay_unread_never_turns_the_clock_back(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: moment)
    server = ServerClock()
    server.set_to(50_000)

    moment = 2.0
    assert not server.advance_to(50_500)

    assert server.now() == 52_000
    assert server.advance_to(51_990)
    assert server.now() == 52_000
    assert server.advance_to(53_000)
    assert server.now() == 53_000
    server.set_to(40_000)
    assert server.now() == 40_000
