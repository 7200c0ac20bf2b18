"""What a Cluster answers in place of a script's reply is raised, and never read as one."""

from __future__ import annotations

import pytest
import redis
from redis.exceptions import ClusterError

from millstream.broker.queue import scripts


class _Pipe:
    commands = 0

    def execute_command(self, *words: object) -> None:
        self.commands += 1

    def execute(self, raise_on_error: bool) -> list[Exception]:
        return [ClusterError("redirected again and again")] * self.commands


class _Lost(redis.Redis):
    """A Cluster whose nodes name each other."""

    def __init__(self) -> None:
        """It has no connection."""

    def pipeline(self, transaction: bool = True, shard_hint: object = None) -> _Pipe:  # type: ignore[override]
        return _Pipe()

    def __del__(self) -> None:
        """There is nothing to close."""


def test_a_script_that_no_node_runs_raises_the_clusters_error() -> None:
    with pytest.raises(ClusterError):
        scripts.run(_Lost(), "settle", ["k"], ["x"])

    with pytest.raises(ClusterError):
        scripts.run_after(_Lost(), ["PING"], "claim", ["k"], ["x"])
