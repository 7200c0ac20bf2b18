"""A server with two services, real workers and real trouble, a dashboard on it, and one Chromium for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from browser.chromium import Tab, browsing
from browser.staging import Mill, calling, serving
from contracts.queue import Queue, draft
from workers import spec, working

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.pause import pause
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection

HOSTILE = "model_failed: <img src=x onerror=document.title='hacked'><script>document.title='hacked'</script>"


@pytest.fixture(scope="session")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mill]:
    """embed works, rerank is paused with jobs that wait, thumbnails has no worker and two dead letters."""
    with EmbeddedServer.start(tmp_path_factory.mktemp("mill"), appendfsync="everysec") as server, ExitStack() as ends:
        connection = ends.enter_context(closing(Connection(server.url)))
        embed, rerank, thumbnails = spec("embed", forward_s=0.05, batch_size=8), spec("rerank"), spec("thumbnails")
        # The longest name that a service may have must fit, too.
        Registry(connection).push([thumbnails, spec("x" * 64)])
        ends.enter_context(working(server.url, embed, rerank))
        pause(connection.client, ServiceKeys("rerank"))
        queues = [Queue(connection.client, ServiceKeys(name)) for name in ("rerank", "thumbnails")]
        for reason in ("worker_lost: killed by SIGKILL, 3 attempts", HOSTILE):
            (claim,) = queues[1].hold("gone", draft())
            queues[1].settle([claim], bury=reason)
        for queue in queues:
            queue.put(*[draft() for _ in range(5)])
        ends.enter_context(calling(server.url))
        url = ends.enter_context(serving(connection))
        yield Mill(server, url, queues[1])


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def tab(chromium: Tab) -> Iterator[Tab]:
    """The tab, as a window for a desk. The test fails if the browser complained of anything."""
    chromium.look_like(1280, "light")
    chromium.problems.clear()
    yield chromium
    chromium.run("1")
    problems = list(chromium.problems)
    chromium.open("about:blank")
    assert problems == []
