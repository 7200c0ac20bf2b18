"""Retry of a run's rows that failed: results of those that succeed now are merged into the files of their shards.

A few shards at a time make a step. Their new files, and an errors.jsonl that agrees with them, are staged; the manifest
notes the step; then they are renamed. See `staging.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

from millstream.broker.config.spec import PriorityName
from millstream.broker.contract.errors import BrokerUnavailable, InvalidRequest, MixedModels
from millstream.client.bulk.errors import encode_errors, read_errors, rewrite_errors
from millstream.client.bulk.files import reading
from millstream.client.bulk.items import Result, Shard
from millstream.client.bulk.manifest import ERRORS, Header, Manifest, Note, Retry, read_manifest
from millstream.client.bulk.merging import Merge, Sink
from millstream.client.bulk.openai_source import expand
from millstream.client.bulk.plan import STDIN, WINDOW, BulkPlan
from millstream.client.bulk.progress import BulkProgress, Pace
from millstream.client.bulk.results import collect
from millstream.client.bulk.resuming import begin, open_input
from millstream.client.bulk.sending import Group, Sending
from millstream.client.bulk.sinks import find_sink
from millstream.client.bulk.sources import Source
from millstream.client.bulk.staging import clear, stage
from millstream.client.call_options import CallOptions, find_operation
from millstream.client.calls import Calls

STEP_SHARDS = 32
"""Shards of a step at most. Each step copies errors.jsonl, and a process that ends loses the merges of one step."""


@dataclass(frozen=True, slots=True)
class RetryPlan:
    """Arguments of a retry. `input` None: the path that the run had."""

    output: Path
    input: str | None = None
    priority: PriorityName = "batch"
    tenant: str = ""
    window: int = WINDOW

    def of_run(self, header: Header) -> BulkPlan:
        """Returns the plan of the run with this header. Raises InvalidRequest if its layout cannot be read."""
        layout = dict(header.layout)
        try:
            return BulkPlan(
                header.service,
                self.input or header.source or STDIN,
                self.output,
                CallOptions(self.priority, None, True, self.tenant, header.options),
                window=self.window,
                output_format=layout.pop("format"),  # type: ignore[arg-type]
                **cast("dict[str, object]", layout),  # type: ignore[arg-type]
            )
        except (TypeError, KeyError) as error:
            raise InvalidRequest(
                f"the run in {self.output} cannot be read: {error}"[:300], hint="written by another version?"
            ) from error


class Failed(NamedTuple):
    """Shard with rows that failed, by their numbers."""

    note: Note
    rows: Sequence[int]


def retry_failed(calls: Calls, plan: RetryPlan, report: Callable[[BulkProgress], object]) -> BulkProgress:
    """Does as Client.retry_failed. `report` gets the progress at the start and after each step."""
    # Before the manifest is opened, which would make a new folder.
    header = read_manifest(plan.output)[0].header
    if header is None:
        raise InvalidRequest(f"the run in {plan.output} has not begun yet")
    run = plan.of_run(header)
    run.check()
    spec = calls.services.read(run.service)
    opts = run.opts.validate()
    sink = find_sink(run.output_format, find_operation(spec, opts.op), bodies=run.input_format == "openai")
    with Manifest(plan.output) as manifest:
        source = open_input(run, spec)
        begin(manifest, run, spec, source, calls.services.fingerprint(spec.name))
        number, first = find_turn(manifest.retry)
        sending = Sending(calls, spec, opts, f"{header.run}:retry{number}", run.window)
        return _Retry(calls, manifest, header, source, sink, sending, number, report).run(first)


def find_turn(last: Retry | None) -> tuple[int, int]:
    """Returns the number of a retry and its first shard. A retry that ended early goes on behind its last step."""
    if last is None:
        return 1, 0
    return (last.number + 1, 0) if last.finished else (last.number, last.upto)


class _Retry:
    """One process's work on a retry."""

    def __init__(
        self,
        calls: Calls,
        manifest: Manifest,
        header: Header,
        source: Source,
        sink: Sink,
        sending: Sending,
        number: int,
        report: Callable[[BulkProgress], object],
    ) -> None:
        self._services, self._manifest, self._header = calls.services, manifest, header
        self._source, self._sink = source, sink
        self._sending, self._number, self._report = sending, number, report
        self._folder = manifest.folder
        self._rows = self._failed = 0

    def run(self, first: int) -> BulkProgress:
        """Runs the failed rows from the shard `first` on."""
        total = sum(note.failed for note in self._manifest.notes if note.begin.shard >= first)
        self._pace = Pace(self._folder, 0, 0.0, time.monotonic())
        progress = self._tell(total)
        failed = find_failed(self._folder, self._manifest.notes, first)
        step, following = list(islice(failed, STEP_SHARDS)), list(islice(failed, STEP_SHARDS))
        while step:
            self._do(step, is_last=not following)
            step, following = following, list(islice(failed, STEP_SHARDS))
            progress = self._tell(total)
        return progress

    def _do(self, step: Sequence[Failed], is_last: bool) -> None:
        """Runs the rows of a few shards, and replaces the files that change."""
        tag, groups = f"{self._manifest.steps}", list[Group]()
        try:
            change = self._stage(step, is_last, tag, groups)
        except BaseException:
            # A full disk needs the room. Behind this block the manifest may have the note, and needs the files.
            clear(self._folder)
            raise
        self._manifest.replace(change)
        with suppress(BrokerUnavailable):
            for group in groups:
                self._sending.forget(group)

    def _stage(self, step: Sequence[Failed], is_last: bool, tag: str, groups: list[Group]) -> Retry:
        """Stages the new files of a few shards. Returns the note of the change; `groups` gets their rows."""
        files, lines, failures = list[str](), dict[int, bytes](), dict[str, int]()
        for failed, group in zip(step, self._compute(step), strict=True):
            groups.append(group)
            results = self._collect(failed.note, group)
            again = encode_errors(results)
            lines |= {row: again.get(row, b"") for row in failed.rows}
            failures[str(failed.note.begin.shard)] = len(again)
            if len(again) < len(failed.rows):
                self._merge(failed, results, tag)
                files.append(failed.note.file)
            self._rows, self._failed = self._rows + len(failed.rows), self._failed + len(again)
        errors, end = self._folder / ERRORS, self._manifest.notes[-1].errors_end
        new_end = stage(self._folder, tag, ERRORS, lambda file: rewrite_errors(errors, end, lines, file))
        upto = step[-1].note.begin.shard + 1
        return Retry(self._number, upto, is_last, failures, new_end, [*files, ERRORS], tag)

    def _compute(self, step: Sequence[Failed]) -> Iterator[Group]:
        """Yields each shard of a step once its rows have outcomes."""
        chunks = (chunk for failed in step for chunk in self._sending.split([self._read(failed)]))
        for chunk in self._sending.compute(chunks, lambda _: None):
            if not chunk.owner.waiting:
                yield chunk.owner

    def _read(self, failed: Failed) -> Shard:
        """Returns the failed rows of a shard. Raises InvalidRequest if the input is another one now."""
        begin, end = failed.note.begin, failed.note.end
        shard = next(self._source.read_shards(begin), None)
        if shard is None or (shard.digest, shard.end) != (failed.note.digest, end):
            raise InvalidRequest(
                f"the input differs in rows {begin.row} to {end.row - 1}",
                hint="undo the change, or give a new folder as output",
            )
        return keep_rows(shard, failed.rows)

    def _collect(self, note: Note, group: Group) -> list[Result]:
        found = group.fingerprints - {note.fingerprint}
        if found and note.fingerprint:
            raise MixedModels(
                f"the service's weights changed since the run: {', '.join(sorted(found))}"[:500],
                hint="go on once all workers run the weights of the finished shards, or begin in a new folder",
            )
        service, created = self._header.service, int(time.time())
        ((shard, outcomes, tokens),) = group.by_shard()
        return collect(shard, outcomes, tokens, self._header.run, service, created)

    def _merge(self, failed: Failed, results: Sequence[Result], tag: str) -> None:
        note, before = failed.note, self._folder / failed.note.file
        merge = Merge(range(note.begin.row, note.end.row), set(failed.rows), {each.row: each for each in results})
        with reading(before), before.open("rb"):
            pass
        stage(self._folder, tag, note.file, lambda file: self._sink.merge(file, before, merge))

    def _tell(self, total: int) -> BulkProgress:
        share = self._rows / total if total else 1.0
        self._services.live(self._header.service, lambda: None)
        workers = self._services.last_known(self._header.service).live_workers
        progress = self._pace.measure(self._rows, self._failed, share, workers, time.monotonic())
        self._report(progress)
        return progress


def find_failed(folder: Path, notes: Sequence[Note], first: int) -> Iterator[Failed]:
    """Yields the shards from number `first` on that have failed rows. errors.jsonl may be replaced meanwhile.

    Raises InvalidRequest if it does not have as many rows of a shard as the manifest says.
    """
    errors = folder / ERRORS
    rows = (row for row, _ in read_errors(errors, notes[-1].errors_end)) if notes else iter(())
    for note in notes:
        own = list(islice(rows, note.failed))
        if len(own) != note.failed or any(not note.begin.row <= row < note.end.row for row in own):
            raise InvalidRequest(
                f"{errors} does not have the {note.failed} failed rows of {note.file}",
                hint="it was changed: begin in a new folder",
            )
        if own and note.begin.shard >= first:
            yield Failed(note, own)


def keep_rows(shard: Shard, numbers: Sequence[int]) -> Shard:
    """Returns the rows of a shard with these numbers."""
    places = [number - shard.begin.row for number in numbers]
    if shard.requests is None:
        return shard._replace(rows=[shard.rows[at] for at in places], numbers=numbers)
    requests = [shard.requests[at] for at in places]
    return shard._replace(
        rows=[row for request in requests for row in expand(request)], requests=requests, numbers=numbers
    )
