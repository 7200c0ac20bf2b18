"""Bulk runs: reads shards, sends their rows, and writes each finished shard before it notes it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

from millstream.broker.contract.errors import BrokerUnavailable, MixedModels
from millstream.client.bulk.errors import ErrorsFile
from millstream.client.bulk.files import write_whole
from millstream.client.bulk.items import Mark
from millstream.client.bulk.manifest import Manifest, Note
from millstream.client.bulk.merging import Sink
from millstream.client.bulk.plan import BulkPlan
from millstream.client.bulk.progress import BulkProgress, Pace
from millstream.client.bulk.results import collect
from millstream.client.bulk.resuming import begin, open_input
from millstream.client.bulk.sending import Chunk, OpenShard, Sending
from millstream.client.bulk.sinks import find_sink, name_part
from millstream.client.bulk.sources import Source
from millstream.client.call_options import find_operation
from millstream.client.calls import Calls

Report = Callable[[BulkProgress], object]


def run_bulk(calls: Calls, plan: BulkPlan, report: Report) -> BulkProgress:
    """Does as Client.bulk. `report` gets the progress at the start and after each shard."""
    plan.check()
    opts = plan.opts.validate()
    spec = calls.services.read(plan.service)
    sink = find_sink(plan.output_format, find_operation(spec, opts.op), bodies=plan.input_format == "openai")
    # Checks the options before anything is written. Requests in OpenAI's shape have options of their own.
    if plan.input_format != "openai":
        calls.check_options(spec, opts.options)
    with Manifest(plan.output) as manifest:
        source = open_input(plan, spec)
        header = begin(manifest, plan, spec, source, calls.services.fingerprint(spec.name))
        with ErrorsFile(plan.output, manifest.notes[-1].errors_end if manifest.notes else 0) as errors:
            sending = Sending(calls, spec, opts, header, plan.window)
            return _Run(calls, plan, source, sink, manifest, errors, sending, report).run()


class _Run:
    """One process's work on a run."""

    def __init__(
        self,
        calls: Calls,
        plan: BulkPlan,
        source: Source,
        sink: Sink,
        manifest: Manifest,
        errors: ErrorsFile,
        sending: Sending,
        report: Report,
    ) -> None:
        self._calls, self._plan, self._source, self._sink = calls, plan, source, sink
        self._manifest, self._errors, self._sending, self._report = manifest, errors, sending, report
        self._run_id = manifest.header.run if manifest.header else ""
        self._mark = manifest.notes[-1].end if manifest.notes else Mark()
        self._rows = sum(note.rows for note in manifest.notes)
        self._failed = sum(note.failed for note in manifest.notes)
        self._size = max(1, source.length())
        self._pace = Pace(plan.output, self._rows, self._mark.position / self._size, time.monotonic())

    def run(self) -> BulkProgress:
        """Computes all rows behind the last finished shard."""
        in_flight: deque[Chunk] = deque()
        chunks = self._split_shards()
        progress = self._tell(self._mark.position / self._size)
        following = next(chunks, None)
        while following or in_flight:
            while following and self._may_send(in_flight):
                self._sending.send(following)
                in_flight.append(following)
                following = next(chunks, None)
            chunk = in_flight.popleft()
            self._sending.receive(chunk)
            if not chunk.owner.waiting:
                self._finish(chunk.owner)
                progress = self._tell(self._mark.position / self._size)
        self._manifest.finish()
        # Blank lines at the end of an input, and shards of other parts, are not of this run.
        return self._tell(1.0) if progress.share < 1.0 else progress

    def _split_shards(self) -> Iterator[Chunk]:
        for shard in self._source.read_shards(self._mark):
            if self._plan.has(shard.begin.shard):
                yield from self._sending.split(shard)

    def _may_send(self, in_flight: deque[Chunk]) -> bool:
        rows, jobs = sum(len(each.rows) for each in in_flight), sum(each.jobs for each in in_flight)
        return not in_flight or self._sending.may_send(rows, jobs)

    def _finish(self, open_shard: OpenShard) -> None:
        """Writes a shard's errors and results, and then notes it."""
        shard = open_shard.shard
        begin, end = shard.begin, shard.end
        fingerprint = self._check_weights(open_shard)
        outcomes, tokens = open_shard.outcomes, open_shard.tokens
        results = collect(shard, outcomes, tokens, self._run_id, self._plan.service, int(time.time()))
        failed = self._errors.append(results)
        file = self._manifest.folder / name_part(begin.shard, self._plan.output_format)
        write_whole(file, lambda opened: self._sink.write(opened, results))
        self._manifest.add(Note(begin, end, shard.digest, failed, self._errors.end, fingerprint, file.name))
        self._mark, self._rows, self._failed = end, self._rows + len(results), self._failed + failed
        with suppress(BrokerUnavailable):
            self._sending.forget(open_shard)

    def _check_weights(self, open_shard: OpenShard) -> str:
        """Returns the fingerprint of the weights of the run so far. Raises MixedModels if the shard has others."""
        notes = self._manifest.notes
        before = notes[-1].fingerprint if notes else ""
        found = open_shard.fingerprints | ({before} if before else set())
        if len(found) > 1:
            raise MixedModels(
                f"the service's weights changed during the run: {', '.join(sorted(found))}"[:500],
                hint="go on once all workers run the weights of the finished shards, or give a new folder as output",
            )
        return next(iter(found), "")

    def _tell(self, share: float) -> BulkProgress:
        services, name = self._calls.services, self._plan.service
        services.live(name, lambda: None)
        workers = services.last_known(name).live_workers
        progress = self._pace.measure(self._rows, self._failed, share, workers, time.monotonic())
        self._report(progress)
        return progress
