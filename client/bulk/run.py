"""Bulk runs: reads groups of shards, sends their rows, and writes a finished group before it notes its shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

from millstream.broker.contract.errors import BrokerUnavailable, MixedModels
from millstream.client.bulk.errors import ErrorsFile
from millstream.client.bulk.files import write_whole
from millstream.client.bulk.items import Mark, Shard
from millstream.client.bulk.manifest import Manifest, Note
from millstream.client.bulk.merging import Sink
from millstream.client.bulk.plan import BulkPlan
from millstream.client.bulk.progress import BulkProgress, Pace
from millstream.client.bulk.results import collect
from millstream.client.bulk.resuming import begin, open_input, pin_version
from millstream.client.bulk.sending import Chunk, Group, Sending
from millstream.client.bulk.sinks import find_sink, name_part
from millstream.client.bulk.sources import Source
from millstream.client.call_options import find_operation
from millstream.client.calls import Calls
from millstream.client.row_results import RowOutcome

Report = Callable[[BulkProgress], object]


def run_bulk(calls: Calls, plan: BulkPlan, report: Report) -> BulkProgress:
    """Does as Client.bulk. `report` gets the progress at the start, after each call, and every 2 s."""
    plan.check()
    opts = plan.opts.validate()
    plan = pin_version(calls, plan)
    spec = calls.services.read(plan.service)
    sink = find_sink(plan.output_format, find_operation(spec, opts.op), bodies=plan.input_format == "openai")
    # Checks the options before anything is written. Requests in OpenAI's shape have options of their own.
    if plan.input_format != "openai":
        calls.check_options(spec, opts.options)
    with Manifest(plan.output) as manifest:
        source = open_input(plan, spec)
        header = begin(manifest, plan, spec, source, calls.services.fingerprint(spec.name))
        with ErrorsFile(plan.output, manifest.notes[-1].errors_end if manifest.notes else 0) as errors:
            sending, group = Sending(calls, spec, opts, header, plan.window), plan.shards_of_group(spec)
            return _Run(calls, plan, source, sink, manifest, errors, sending, group, report).run()


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
        group_shards: int,
        report: Report,
    ) -> None:
        self._calls, self._plan, self._source, self._sink = calls, plan, source, sink
        self._manifest, self._errors, self._sending, self._report = manifest, errors, sending, report
        self._run_id = manifest.header.run if manifest.header else ""
        self._group_shards = group_shards
        self._mark = manifest.notes[-1].end if manifest.notes else Mark()
        self._rows = sum(note.rows for note in manifest.notes)
        self._failed = sum(note.failed for note in manifest.notes)
        self._size = max(1, source.length())
        self._pace = Pace(plan.output, self._rows, self._mark.position / self._size, time.monotonic())

    def run(self) -> BulkProgress:
        """Computes all rows behind the last finished group of shards."""
        self._tell()
        for chunk in self._sending.compute(self._split_groups(), self._tell):
            if chunk.owner.waiting:
                self._tell(chunk)
            else:
                self._finish(chunk.owner)
                self._tell()
        self._manifest.finish()
        # Blank lines at the end of an input, and shards of other parts, are not of this run.
        return self._report_at(self._rows, self._failed, 1.0)

    def _split_groups(self) -> Iterator[Chunk]:
        """Yields the calls of all groups. The same input and mark give the same groups."""
        shards = (shard for shard in self._source.read_shards(self._mark) if self._plan.has(shard.begin.shard))
        while group := list(islice(shards, self._group_shards)):
            yield from self._sending.split(group)

    def _finish(self, group: Group) -> None:
        """Writes the errors and results of a group's shards, and then notes the shards."""
        fingerprint = self._check_weights(group)
        notes = [self._write(shard, outcomes, tokens, fingerprint) for shard, outcomes, tokens in group.by_shard()]
        self._manifest.add(notes)
        # Not the group's own numbers: a row of the input may be sent as several.
        self._mark, self._rows = notes[-1].end, self._rows + sum(note.rows for note in notes)
        self._failed += sum(note.failed for note in notes)
        with suppress(BrokerUnavailable):
            self._sending.forget(group)

    def _write(self, shard: Shard, outcomes: Sequence[RowOutcome], tokens: Sequence[int], fingerprint: str) -> Note:
        """Writes the errors and results of a shard. Returns its note."""
        begin, end = shard.begin, shard.end
        results = collect(shard, outcomes, tokens, self._run_id, self._plan.service, int(time.time()))
        failed = self._errors.append(results)
        file = self._manifest.folder / name_part(begin.shard, self._plan.output_format)
        write_whole(file, lambda opened: self._sink.write(opened, results))
        return Note(begin, end, shard.digest, failed, self._errors.end, fingerprint, file.name)

    def _check_weights(self, group: Group) -> str:
        """Returns the fingerprint of the weights of the run so far. Raises MixedModels if the group has others."""
        notes = self._manifest.notes
        before = notes[-1].fingerprint if notes else ""
        found = group.fingerprints | ({before} if before else set())
        if len(found) > 1:
            raise MixedModels(
                f"the service's weights changed during the run: {', '.join(sorted(found))}"[:500],
                hint="go on once all workers run the weights of the finished shards, or give a new folder as output",
            )
        return next(iter(found), "")

    def _tell(self, chunk: Chunk | None = None) -> None:
        """Reports the progress. `chunk` is the oldest call without results, or the last one with results."""
        rows, failed, position = self._rows, self._failed, float(self._mark.position)
        if chunk:
            group = chunk.owner
            begin, end = group.shards[0].begin.position, group.shards[-1].end.position
            rows, failed = rows + group.done + round(len(chunk.rows) * chunk.answered), failed + group.failed
            # The longest rows come first, so their number says little about the time that is left.
            position = begin + (end - begin) * (group.worked + chunk.size * chunk.answered) / max(1, group.work)
        self._report_at(rows, failed, position / self._size)

    def _report_at(self, rows: int, failed: int, share: float) -> BulkProgress:
        services, name = self._calls.services, self._plan.service
        services.live(name, lambda: None)
        workers = services.last_known(name).live_workers
        progress = self._pace.measure(rows, failed, share, workers, time.monotonic())
        self._report(progress)
        return progress
