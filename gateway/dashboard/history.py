"""The last minutes of each service's figures, for charts. Bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

MOST_SAMPLES = 300
"""Samples of a service that are kept: ten minutes at one in two seconds."""

MOST_SERVICES = 200
"""Services whose samples are kept: the first ones by name."""

Sample = Mapping[str, float | None]
"""Figures of a service at one time, by name; None if there is none."""


class History:
    """Samples by service. One thread adds; others may read."""

    def __init__(self, most_samples: int = MOST_SAMPLES, most_services: int = MOST_SERVICES) -> None:
        self._most_samples = most_samples
        self._most_services = most_services
        self._samples: dict[str, deque[tuple[float, Sample]]] = {}

    def add(self, at: float, samples: Iterable[tuple[str, Sample]]) -> None:
        """Adds the samples of all services at `at`, seconds since 1970, and forgets the other services."""
        newest = dict(sorted(samples, key=lambda each: each[0])[: self._most_services])
        # A new dict, not a changed one: a reader may be in the middle of the old one.
        self._samples = {name: self._samples.get(name) or deque(maxlen=self._most_samples) for name in newest}
        for name, sample in newest.items():
            self._samples[name].append((at, sample))

    def series(self, service: str, names: Sequence[str]) -> list[list[float | None]]:
        """Returns the times, and then the figures of each name, as the chart library takes them."""
        samples = list(self._samples.get(service, ()))
        return [[at for at, _ in samples], *([sample.get(name) for _, sample in samples] for name in names)]
