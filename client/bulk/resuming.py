"""Begin of a process's work on a bulk run: opens its input, and checks that nothing changed since the run began."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import InvalidRequest
from millstream.client.bulk.files import spool
from millstream.client.bulk.manifest import SPOOL, Manifest, Note, read_manifest
from millstream.client.bulk.openai_source import OpenAISource
from millstream.client.bulk.opening import open_source
from millstream.client.bulk.plan import STDIN, BulkPlan
from millstream.client.bulk.sources import Source
from millstream.client.calls import Calls
from millstream.client.known import KnownRoute


def open_input(plan: BulkPlan, spec: ServiceSpec) -> Source:
    """Returns the source of a run. Copies standard input to the run's folder first."""
    path = Path(plan.input)
    if plan.input == STDIN:
        path = plan.output / SPOOL
        spool(sys.stdin.buffer, path)
    return open_source(path, plan.input_format, plan.column, plan.id_column, plan.rows_of_shard(spec))


def begin(manifest: Manifest, plan: BulkPlan, spec: ServiceSpec, source: Source, fingerprint: str) -> str:
    """Writes the header of a new run, or checks that the run in the manifest may go on. Returns the run's id.

    Raises InvalidRequest if something changed that decides the results, and says what it is.
    """
    now, before = plan.describe(spec, source), manifest.header
    if before is None:
        # Once: later the input is known to be the same.
        if isinstance(source, OpenAISource):
            source.check()
        manifest.begin(now)
        return now.run
    changes = before.find_changes(now)
    last = manifest.notes[-1] if manifest.notes else None
    if last and fingerprint and last.fingerprint and fingerprint != last.fingerprint:
        changes.append(f"the weights were {last.fingerprint} and are {fingerprint}")
    if not changes and last:
        # The time differs: each finished shard is read again. Otherwise the last one is a cheap check.
        touched = before.input.get("modified") != now.input.get("modified")
        changes = find_changed_shards(source, manifest.notes if touched else [last])
    if changes:
        raise InvalidRequest(
            f"the run in {plan.output} cannot go on: {'; '.join(changes)}"[:1000],
            hint="undo the change, or give a new folder as output",
        )
    return before.run


def pin_version(calls: Calls, plan: BulkPlan) -> BulkPlan:
    """Returns the plan of a run whose rows all go to one service. Waits for the server.

    If the plan's service is a route, it is the service of the run so far, or of the version that the plan names, or of
    the version that the route chooses. Raises InvalidRequest, UnknownService, BrokerUnavailable.
    """
    target = calls.services.read_target(plan.service)
    standing = _service_so_far(plan) if isinstance(target, KnownRoute) and not plan.opts.version else None
    if isinstance(target, KnownRoute) and standing in target.route.services.values():
        return replace(plan, service=str(standing))
    service = calls.services.choose(target, plan.opts.caller).spec.name
    return replace(plan, service=service, opts=plan.opts._replace(version=""))


def _service_so_far(plan: BulkPlan) -> str | None:
    """Returns the service of the run in the plan's folder; None if it has not begun."""
    # A damaged manifest is reported when the run opens it.
    with suppress(InvalidRequest):
        record, _ = read_manifest(plan.output)
        return record.header.service if record.header else None
    return None


def find_changed_shards(source: Source, notes: list[Note]) -> list[str]:
    """Returns the first of the noted shards whose input has changed, as a message; an empty list if none has."""
    for note in notes:
        if source.digest(note.begin.position, note.end.position) != note.digest:
            return [f"the input differs in rows {note.begin.row} to {note.end.row - 1}"]
    return []
