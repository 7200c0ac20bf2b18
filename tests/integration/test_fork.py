"""Processes that fork with a client in hand: parent and child each go on with their own calls."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bystander import Bystander
from workers import LONG_S

from millstream.broker.server.embedded import EmbeddedServer

FORKING = Path(__file__).with_name("forking.py")


def forking(way: str, url: str, echo: str, idle: str) -> None:
    # From Python 3.12 on every fork of a process with threads warns; here it is what is tested.
    done = subprocess.run(
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", FORKING, way, url, echo, idle],
        env={**os.environ, "MILLSTREAM_REDIS_URL": url},
        capture_output=True,
        text=True,
        timeout=LONG_S + 30,
        check=False,
    )

    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize(
    "way", ["prefork", "inherited", "closing", "under_load", "with_locks_held", "with_multiprocessing"]
)
def test_a_process_may_fork_with_a_client_in_hand(
    server: EmbeddedServer, echo: str, bystander: Callable[..., Bystander], way: str
) -> None:
    forking(way, server.url, echo, bystander(total_timeout=None).name)


def test_a_call_imports_nothing_that_a_forked_child_would_wait_for(
    server: EmbeddedServer, echo: str, bystander: Callable[..., Bystander]
) -> None:
    assert server.tcp_url

    for url in (server.url, server.tcp_url):
        forking("importing_nothing", url, echo, bystander(total_timeout=None).name)
