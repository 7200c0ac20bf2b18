"""A scrape of the exporter, as Prometheus reads it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client.parser import text_string_to_metric_families

from millstream.broker.transport.connection import Connection
from millstream.telemetry.exporter import serve
from millstream.telemetry.readings import reader


class Scrape:
    """The samples of one scrape. `types`: type of each family."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.types: Mapping[str, str] = {family.name: family.type for family in families}
        self.samples = [sample for family in families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of `name` that have these labels."""
        found = [each for each in self.samples if each.name == name and labels.items() <= each.labels.items()]
        assert found, f"no sample {name} {labels}"
        return sum(each.value for each in found)

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """The samples of `name` with these labels that are not 0, by another label."""
        found = [each for each in self.samples if each.name == name and labels.items() <= each.labels.items()]
        return {each.labels[label]: each.value for each in found if each.value}


def fetch(port: int) -> Scrape:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
        return Scrape(answer.read().decode())


@contextmanager
def exporting(url: str) -> Iterator[int]:
    """An exporter of the services of `url`: its port."""
    connection = Connection(url, name="tests")
    port, stop = serve(reader(connection), "127.0.0.1", 0)
    try:
        yield port
    finally:
        stop()
        connection.close()
