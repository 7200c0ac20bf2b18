"""Two hundred callers of one text each are batched; a caller that is alone does not wait for company."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from e2e.conftest import Say, Supervised
from e2e.reference import TEXTS, Reference
from e2e.sites import MODEL, Site, echo, minilm, site_of
from sentence_transformers import SentenceTransformer

from millstream.client import Client
from millstream.worker.models.loading.source import locate

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]

LONG = bool(os.environ.get("MILLSTREAM_LONG"))
PROCESSES, THREADS, LOAD_S = (8, 25, 6.0) if LONG else (4, 50, 3.0)
ROUNDS, CALLS = 6, 60
LIMIT_S = 0.005
WORKERS = 2


@pytest.fixture(scope="module")
def site(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_of(url, minilm(batch_size=64), tmp_path_factory.mktemp("load")) as site:
        site.start_host(WORKERS)
        site.await_workers(WORKERS)
        yield site


def totals(site: Site) -> dict[str, int]:
    """The workers' own counters, summed."""
    return {name: sum(site.watch.counted(name).values()) for name in ("rows", "forwards")}


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def test_single_texts_of_200_callers_are_answered_in_batches(site: Site, reference: Reference, say: Say) -> None:
    callers = [site.start_caller(THREADS, reference, single=True) for _ in range(PROCESSES)]
    for caller in callers:
        caller.await_first_call()
    before = totals(site)

    began = time.monotonic()
    threading.Event().wait(LOAD_S)
    after, seconds = totals(site), time.monotonic() - began
    tallies = [caller.stop() for caller in callers]

    rows, forwards = (after[name] - before[name] for name in ("rows", "forwards"))
    say(f"{PROCESSES * THREADS} callers: {rows / seconds:.0f} texts/s, {rows / forwards:.1f} rows a forward")
    assert [tally["wrong"] for tally in tallies] == [[]] * PROCESSES
    assert all(tally["answered"] == tally["calls"] > 0 for tally in tallies)
    assert rows / forwards > 8
    assert site.watch.held() == []


@pytest.mark.skipif(not LONG, reason="MILLSTREAM_LONG is not 1: it needs a quiet machine")
def test_a_lone_caller_waits_at_most_5_ms_longer_than_for_the_model_itself(site: Site, say: Say) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORKERS))
    model = SentenceTransformer(str(locate(MODEL)), device="cpu")
    added: list[float] = []

    with Client(site.url) as client:
        # A machine busy with other things only adds to it: one quiet round shows what the queue itself adds.
        while len(added) < ROUNDS and min(added, default=LIMIT_S) >= LIMIT_S:
            queued, direct = medians(client, site.spec.name, model)
            say(f"alone: p50 {queued * 1000:.1f} ms through the queue, {direct * 1000:.1f} ms by the model itself")
            added.append(queued - direct)

    assert min(added) < LIMIT_S


def medians(client: Client, service: str, model: SentenceTransformer) -> tuple[float, float]:
    """The p50 of calls in turn: through the queue, and straight to the model."""
    queued: list[float] = []
    direct: list[float] = []
    for at in range(CALLS):
        text = TEXTS[at % len(TEXTS)]
        queued.append(seconds_of(partial(client.embed, text, service=service)))
        direct.append(seconds_of(partial(model.encode, [text])))
    return statistics.median(queued), statistics.median(direct)


@pytest.mark.parametrize("crowd", [0, 32], ids=["always", "after a crowd"])
def test_a_lone_caller_does_not_wait_for_company(supervised: Supervised, say: Say, crowd: int) -> None:
    site = supervised(echo("sleep:0.005", batch_timeout=1.0), 1)

    with Client(site.url) as client:
        call = partial(answer, client, site.spec.name)
        with ThreadPoolExecutor(max(1, crowd)) as pool:
            list(pool.map(call, range(100 * crowd)))
        seconds = [seconds_of(partial(call, number)) for number in range(50)]

    p50, worst = statistics.median(seconds), max(seconds)
    say(f"alone with batch_timeout 1 s, after {crowd} others: p50 {p50 * 1000:.1f} ms, worst {worst * 1000:.1f} ms")
    assert p50 < 0.3
    assert sum(seconds) < 2.0


def answer(client: Client, service: str, number: int) -> object:
    return client.submit(service, [f"row {number}"]).result()
