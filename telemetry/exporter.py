"""Serves the metrics of all services of one server to Prometheus, read at each scrape.

If the server does not answer, a scrape gets `millstream_up 0` alone; the next one tries again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, start_http_server
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from millstream.broker.contract.errors import ConfigError, MillstreamError, described
from millstream.broker.queue.metrics import HistogramView
from millstream.telemetry.metrics import METRICS, UP, UP_HELP, Metric, Reading

log = logging.getLogger(__name__)

PAGE_TYPE = CONTENT_TYPE_LATEST
"""Content type of a page of metrics."""


class ServiceCollector(Collector):
    """Metrics of the services that `read` returns. Thread-safe: scrapes may overlap."""

    def __init__(self, read: Callable[[], Sequence[Reading]]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._is_up: bool | None = None

    def collect(self) -> Iterator[Family]:
        """Yields a family for each metric; UP alone if the server does not answer."""
        up = GaugeMetricFamily(UP, UP_HELP)
        try:
            readings = self._read()
        except Exception as error:  # noqa: BLE001 - whatever it is, the scrape gets an answer, and the log the reason
            self._note(error)
            up.add_metric([], 0)
            yield up
            return
        self._note(None)
        up.add_metric([], 1)
        yield up
        for metric in METRICS:
            yield family_of(metric, readings)

    def _note(self, error: Exception | None) -> None:
        """Writes a line to the log when the server goes away, and one when it is back."""
        with self._lock:
            before, self._is_up = self._is_up, error is None
        if error and before is not False:
            reason = str(error) if isinstance(error, MillstreamError) else described(error)
            log.warning("the services cannot be read, so %s is 0: %s", UP, reason)
        elif not error and before is False:
            log.warning("the services can be read again")


def family_of(metric: Metric, readings: Sequence[Reading]) -> Family:
    """Returns one metric of all services, as prometheus_client writes it."""
    labels = ["service", metric.label] if metric.label else ["service"]
    if metric.kind == "histogram":
        family = HistogramMetricFamily(metric.name, metric.help, labels=labels)
        for reading in readings:
            for value, view in metric.histograms(reading).items():
                buckets = _cumulative(view, metric.scale)
                family.add_metric(_words(reading, metric, value), buckets, view.total * metric.scale)
        return family
    made = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    plain: CounterMetricFamily | GaugeMetricFamily = made(metric.name, metric.help, labels=labels)
    for reading in readings:
        for value, number in metric.values(reading).items():
            plain.add_metric(_words(reading, metric, value), number)
    return plain


def page_writer(read: Callable[[], Sequence[Reading]]) -> Callable[[], bytes]:
    """Returns a function that writes all metrics as PAGE_TYPE, for a web server of the caller's own. It blocks."""
    registry = _make_registry(read)
    return lambda: generate_latest(registry)


def _make_registry(read: Callable[[], Sequence[Reading]]) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(read))
    return registry


def serve(read: Callable[[], Sequence[Reading]], host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Serves metrics on `host` and `port`, 0 for any free one. Returns the port, and a function that ends it.

    Raises ConfigError if it cannot listen there.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=_make_registry(read))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}", hint="choose another --host or --port"
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop


def _words(reading: Reading, metric: Metric, value: str) -> list[str]:
    return [reading.view.name, value] if metric.label else [reading.view.name]


def _cumulative(view: HistogramView, scale: float) -> list[tuple[str, float]]:
    """Returns the buckets as Prometheus has them: how many values are at most each bound."""
    found: list[tuple[str, float]] = []
    below = 0
    for bound, count in zip([*(f"{bound * scale:g}" for bound in view.bounds), "+Inf"], view.counts, strict=True):
        below += count
        found.append((bound, below))
    return found
