"""Histograms of a lane's forwards, outputs and answers since its process started; they go out with the heartbeat.

Each is observed by one thread: forwards and outputs by the runner, answers by the settler. The heartbeat reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from millstream.broker.contract.job import PRIORITIES, Address
from millstream.broker.contract.metrics import HISTOGRAMS, THOUSAND, Histogram, bucket_fields, sum_field
from millstream.worker.scheduling.active_job import ActiveJob


class Histograms:
    """All histograms of the contract. Times are in ms."""

    def __init__(self) -> None:
        self._by_name = {name: Histogram(bounds) for name, bounds in HISTOGRAMS.items()}
        self._fields = {name: (bucket_fields(name), sum_field(name)) for name in HISTOGRAMS}
        # By the number of the stream, with which an entry's name begins: each answer needs them.
        self._by_stream = {
            str(number): (self._by_name[f"wait:{priority}"], self._by_name[f"total:{priority}"])
            for number, priority in enumerate(PRIORITIES, start=1)
        }

    def __getitem__(self, name: str) -> Histogram:
        return self._by_name[name]

    def add_forward(self, rows: int, tokens: int, computed: int) -> None:
        """Adds a forward over `rows`. `computed`: tokens with padding, 0 if unknown."""
        self._by_name["batch_rows"].observe(rows)
        self._by_name["batch_tokens"].observe(computed or tokens)
        if tokens and computed:
            self._by_name["padding"].observe(computed / tokens)

    def add_output(self, job: ActiveJob, now: int, now_s: float) -> None:
        """Adds a piece of the text of `job` at `now`, server ms, and `now_s`, monotonic seconds."""
        if job.output_at is not None:
            self._by_name["between_tokens"].observe((now_s - job.output_at) * 1000)
        elif not job.records:
            self._by_name["first_token"].observe(max(0, now - job.request.at))
        job.output_at = now_s

    def add_answers(self, answers: Iterable[tuple[Address, Mapping[str, float]]], now: int) -> None:
        """Adds jobs that were settled at `now`, server ms, with their timings. Jobs that never ran do not count."""
        # Collected first: this runs for every job, and a call for each value would take twice the time.
        waits: dict[str, list[float]] = {}
        totals: dict[str, list[float]] = {}
        inferences: list[float] = []
        for address, timings in answers:
            if timings:
                stream, total = address.name[0], now - address.at
                if stream not in waits:
                    waits[stream], totals[stream] = [], []
                waits[stream].append(timings["queue"])
                totals[stream].append(total if total > 0 else 0.0)
                inferences.append(timings["inference"])
        for stream, (wait, total_time) in self._by_stream.items():
            if stream in waits:
                wait.observe_all(waits[stream])
                total_time.observe_all(totals[stream])
                self._by_name["latency"].observe_all(totals[stream])
        self._by_name["inference"].observe_all(inferences)

    def counts(self) -> dict[str, int]:
        """Returns all fields so far that are not zero."""
        found: dict[str, int] = {}
        for name, histogram in self._by_name.items():
            buckets, total = self._fields[name]
            found.update(zip(buckets, histogram.counts, strict=True))
            found[total] = round(histogram.total * THOUSAND)
        return {field: count for field, count in found.items() if count}
