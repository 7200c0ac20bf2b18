"""`millstream queue show`: shows one service's queue, and which limits cut the batches of its workers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict

import click

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.spec import Runtime
from millstream.broker.contract.job import Priority
from millstream.broker.queue.inspector import Inspector, ServiceView
from millstream.broker.queue.pause import Pause
from millstream.broker.queue.registry import Registry
from millstream.cli import options
from millstream.cli.server import connect, find_server
from millstream.cli.table import age, align, bar, number


@click.command()
@options.service
@options.url
@options.prefix
@options.json_output(", with the figures of every worker")
def show(service: str, url: str | None, prefix: str | None, as_json: bool) -> None:
    """Show the queue of SERVICE, and which limit cut the batches of its live workers.

    A batch is cut by rows (batch_size), by tokens including padding (max_batch_tokens), by time (inference_timeout),
    by padding (a separate forward for the next row costs less than the padding it would add), or by arrival (no more
    jobs of its priority were waiting). Raise the limit that cuts most batches; `millstream tune` measures how far that
    helps.
    """
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        spec = Registry(connection, target.prefix).read(service)
        (view,) = Inspector(connection, target.prefix).services([service])
    click.echo(json.dumps(_record(spec, view), ensure_ascii=False, indent=2) if as_json else _text(spec, view))


def pause_text(pause: Pause | None) -> str:
    """Returns a pause as text: "yes" or the time left, and whether new jobs are refused; a dash if there is none."""
    if pause is None:
        return "-"
    lasts = "yes" if pause.left_ms is None else age(pause.left_ms)
    return f"{lasts}, refusing" if pause.refusing else lasts


def as_record(view: ServiceView) -> dict[str, object]:
    """Returns a service as a JSON object."""
    figures = {
        "depth": view.depth,
        "forwards": view.forwards,
        "rows_per_forward": view.rows_per_forward,
        "padding": view.padding,
        "cuts": dict(view.cuts),
    }
    return asdict(view) | figures


def _record(spec: ServiceSpec, view: ServiceView) -> dict[str, object]:
    runtime = spec.runtime
    names = ("batch_size", "max_batch_tokens", "inference_timeout")
    limits = {name: getattr(runtime, name) for name in names} | {"max_queue_size": _queue_sizes(runtime, view)}
    return as_record(view) | {"model": spec.model.model_name, "type": spec.model.type, "limits": limits}


def _text(spec: ServiceSpec, view: ServiceView) -> str:
    waiting = _by_priority(view.waiting)
    rows = f"{number(view.rows_per_forward, 1)} rows each, padding {number(view.padding, 2)}"
    facts = [
        ("service", f"{view.name}: {spec.model.type} {spec.model.model_name}".rstrip()),
        ("waiting", f"{waiting}, given back {view.returned}"),
        ("in flight", str(view.in_flight)),
        ("at most", f"{_by_priority(_queue_sizes(spec.runtime, view))}, in flight included (max_queue_size)"),
        ("oldest", age(view.oldest_ms)),
        ("workers", str(len(view.workers))),
        ("batches", f"{view.forwards}, {rows}" if view.forwards else "0"),
    ]
    return f"{align(facts)}\n\n{align(_cuts(spec.runtime, view))}"


def _queue_sizes(runtime: Runtime, view: ServiceView) -> dict[Priority, int]:
    """Returns the most jobs of each priority that the queue holds."""
    return {priority: runtime.queue_size(priority.value) for priority in view.waiting}


def _by_priority(counts: Mapping[Priority, int]) -> str:
    return ", ".join(f"{priority.value} {count}" for priority, count in counts.items())


def _cuts(runtime: Runtime, view: ServiceView) -> Iterator[tuple[str, ...]]:
    yield ("CUT BY", "BATCHES", "SHARE", "", "LIMIT")
    all_cuts = sum(view.cuts.values())
    for reason, limit in _limits(runtime, view).items():
        count = view.cuts.get(reason, 0)
        share = count / all_cuts if all_cuts else 0.0
        yield (reason, str(count), f"{share:.0%}" if all_cuts else "-", bar(share), limit)


def _limits(runtime: Runtime, view: ServiceView) -> dict[str, str]:
    """Returns the setting behind each reason for a cut."""
    timeouts = [runtime.limits(priority.value).inference_timeout for priority in view.waiting]
    shortest = min((each for each in timeouts if each), default=None)
    return {
        "rows": f"batch_size {runtime.batch_size}",
        "tokens": f"max_batch_tokens {_tokens(runtime, view)}",
        "time": f"inference_timeout {shortest:g}s, half of it" if shortest else "no inference_timeout",
        "padding": "the lengths of the waiting texts",
        "arrival": "no more jobs were waiting",
    }


def _tokens(runtime: Runtime, view: ServiceView) -> str:
    """Returns max_batch_tokens; if it is auto, also the values that the workers measured."""
    if runtime.max_batch_tokens != "auto":
        return str(runtime.max_batch_tokens)
    found = sorted({worker.batch_tokens for worker in view.workers} - {0})
    return f"auto: {', '.join(map(str, found))}" if found else "auto"
