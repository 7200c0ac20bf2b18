"""Draining amid texts: other workers go on with them at once, in order, and nothing is repeated."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any, cast

from e2e.hosts import WORKER_RUN, Host
from e2e.sites import Site, echo_stream, site_of
from support import eventually

from millstream.client import Client

WORDS = 300
"""With steps of 20 ms a text takes 6 s."""


class Reading(threading.Thread):
    """Reads one text as it grows; `pieces` are (seconds since the start of the test, piece)."""

    def __init__(self, client: Client, service: str, text: str) -> None:
        super().__init__()
        self._stream = client.stream(service, text)
        self.pieces: list[tuple[float, str]] = []
        self.error: BaseException | None = None

    @property
    def reason(self) -> str | None:
        return self._stream.finish_reason

    def run(self) -> None:
        try:
            for piece in self._stream:
                self.pieces.append((time.monotonic(), piece))
        except BaseException as error:  # noqa: BLE001 - the test reports it
            self.error = error

    def longest_gap_s(self, since: float) -> float:
        """Longest time between two pieces after `since`."""
        times = [since, *(at for at, _ in self.pieces if at > since)]
        return max(after - before for before, after in itertools.pairwise(times))


def texts(count: int) -> list[str]:
    return [" ".join(f"{number}.{word}" for word in range(WORDS)) for number in range(count)]


def holder(site: Site, hosts: list[Host]) -> Host:
    """The host whose worker holds jobs."""
    live = site.watch.live()
    return next(
        host for host in hosts for consumer, pid in live.items() if pid in host.children and site.watch.held(consumer)
    )


def test_texts_of_a_worker_that_drains_go_on_elsewhere_within_a_second(url: str, tmp_path: Path) -> None:
    with site_of(url, echo_stream("sleep:0.02", batch_size=8), tmp_path / "site") as site, Client(url) as client:
        hosts = [site.start_host(1), site.start_host(1)]
        site.await_workers(2)
        expected = texts(4)
        readings = [Reading(client, site.spec.name, text) for text in expected]
        for reading in readings:
            reading.start()
        eventually(lambda: all(len(reading.pieces) > 10 for reading in readings), within_s=30.0)

        host = holder(site, hosts)
        since = time.monotonic()
        host.terminate()
        status = host.wait(5.0)
        attempts = site.watch.attempts()
        for reading in readings:
            reading.join(60.0)

        assert [reading.error for reading in readings] == [None] * 4
        assert ["".join(piece for _, piece in reading.pieces) for reading in readings] == expected
        assert max(reading.longest_gap_s(since) for reading in readings) < 1.0
        assert status == 0
        # Below 0: earlier deaths would be forgiven, too.
        assert attempts <= 0
        assert "handed over" in host.log
        assert "killed" not in host.log
        assert "Traceback" not in host.log


def test_without_another_worker_texts_go_on_until_the_drain_is_nearly_over(url: str, tmp_path: Path) -> None:
    with site_of(url, echo_stream("sleep:0.02", batch_size=8), tmp_path / "site") as site, Client(url) as client:
        host = site.start_host(2)
        site.await_workers(2)
        (text,) = texts(1)
        handle = client.submit(site.spec.name, [text])
        eventually(lambda: bool(site.watch.held()))

        # Both workers drain at once: none of them is ready for the texts of the other.
        host.terminate()
        value = cast(dict[str, Any], handle.result(30.0)[0])

        assert (value["text"], value["began"]) == (text, [0])
        assert host.wait(10.0) == 0
        assert "handed over" not in host.log


def test_a_text_is_given_back_before_the_drain_timeout_ends_and_goes_on_later(url: str, tmp_path: Path) -> None:
    with site_of(url, echo_stream("sleep:0.02", batch_size=8), tmp_path / "site") as site, Client(url) as client:
        host = site.start_host(1, program=(*WORKER_RUN, "--drain-timeout", "3s"))
        site.await_workers(1)
        (text,) = texts(1)
        handle = client.submit(site.spec.name, [text])
        eventually(lambda: bool(site.watch.held()))

        host.terminate()
        status = host.wait(10.0)
        attempts = site.watch.attempts()
        site.start_host(1)
        value = cast(dict[str, Any], handle.result(30.0)[0])

        assert status == 0
        assert attempts <= 0
        assert "handed over" in host.log
        assert value["text"] == text
        # The second worker did not begin anew.
        assert value["began"][1:] > [0]
