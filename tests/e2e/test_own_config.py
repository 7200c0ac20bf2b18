"""A user's own configuration as it was written: tight limits, four workers, and more calls than it lets through."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from configs import USERS_FILE
from e2e.conftest import Say
from e2e.reference import TEXTS, Reference
from e2e.sites import MODEL, site_of

from millstream.broker.config.load import load
from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import DeadlineExceeded, QueueFull, RateLimited
from millstream.client import Client

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]

LONG = bool(os.environ.get("MILLSTREAM_LONG"))
LOAD_S = 60.0 if LONG else 4.0
WORKERS = 4 if LONG else 2
"""The file says four. Each takes seconds to import its libraries."""

LONGEST_S = 0.75
"""total_timeout is 0.5 s."""

LONG_TEXT = " ".join(["word"] * 250)


def users_service(folder: Path) -> ServiceSpec:
    """The user's embedding service, with the weights from a local package."""
    file = folder / "config.yaml"
    ours = [line for line in USERS_FILE.splitlines() if "reranker_v1:" not in line and "llm_v1:" not in line]
    ours = ours[: ours.index("  reranker_service:")]
    file.write_text("\n".join(ours).replace("all-MiniLM-L6-v2", MODEL))
    (service,) = load(file, {}).services.values()
    return service


class Callers:
    """Threads that call again and again; every other one waits for room, every tenth text is long.

    Only every fifth text is an old one, which the cache answers: its vector is known.
    """

    def __init__(self, client: Client, service: str, reference: Reference) -> None:
        self._client = client
        self._service = service
        self._reference = reference
        self._numbers = itertools.count()
        self.ends: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.wrong: list[str] = []

    def call_until(self, end: float, wait: bool) -> None:
        while time.monotonic() < end:
            number = next(self._numbers)
            began = time.monotonic()
            self.ends[self._call(_text(number), wait)] += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def _call(self, text: str, wait: bool) -> str:
        """How the call ended."""
        try:
            vector = self._client.embed([text], service=self._service, wait=wait)
        except DeadlineExceeded as error:
            return f"DeadlineExceeded in {error.phase} time"
        except (QueueFull, RateLimited) as error:
            return type(error).__name__
        except Exception as error:  # noqa: BLE001 - the test reports it
            self.wrong.append(f"{type(error).__name__}: {error}")
            return "another error"
        if vector.shape != (1, 384) or (text in TEXTS and self._reference.wrong([text], vector)):
            self.wrong.append(f"a wrong vector of {text[:20]!r}")
        return "a vector, of a long text" if text.startswith(LONG_TEXT) else "a vector"


def _text(number: int) -> str:
    if number % 10 == 9:
        return f"{LONG_TEXT} {number}"
    return TEXTS[number % len(TEXTS)] if number % 5 == 0 else f"{TEXTS[number % len(TEXTS)]} {number}"


def test_under_overload_every_call_ends_in_time_and_no_worker_dies(
    url: str, tmp_path: Path, reference: Reference, say: Say
) -> None:
    spec = users_service(tmp_path)
    with site_of(url, spec, tmp_path / "site") as site, Client(site.url) as client:
        host = site.start_host(WORKERS)
        site.await_workers(WORKERS)
        workers = site.watch.live()
        callers = Callers(client, spec.name, reference)
        # It reads the service and connects: what that takes is not the calls'.
        client.submit(spec.name, [TEXTS[0]], timeout=10.0).wait(10.0)

        end = time.monotonic() + LOAD_S
        threads = [threading.Thread(target=callers.call_until, args=(end, wait)) for wait in [True, False] * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        say(f"slowest call {callers.slowest_s:.2f} s; {dict(callers.ends.most_common())}")
        assert callers.wrong == []
        assert callers.slowest_s < LONGEST_S
        assert callers.ends["a vector"]
        assert callers.ends["a vector, of a long text"]
        assert site.watch.live() == workers
        assert host.deaths() == 0
        assert site.watch.dead_letters() == []
