"""docs/examples/generate_text.py runs, against a client without a server."""

from __future__ import annotations

import pytest
from generate_text import ask, tell

from millstream.client.testing import FakeClient


def test_the_example_asks_and_streams(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeClient(services={"chat": "llm"}) as client:
        answer = ask(client)
        story = tell(client)

    assert answer.endswith("tokens)")
    assert story
    assert capsys.readouterr().out == f"{story}\n"
