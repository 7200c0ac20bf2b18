"""The picture of `millstream top`: services with their priorities, and workers, as lines of plain text. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.queue import figure_text
from millstream.broker.queue.figure_text import memory, rate, seconds
from millstream.broker.queue.metrics import HistogramView, ServiceMetrics, backlog_s
from millstream.broker.queue.pace import Look, Pace, WorkerPace, merge
from millstream.broker.queue.views import ServiceView, WorkerView
from millstream.cli.show import as_record, pause_text
from millstream.cli.table import age, cut, escape, fit, number

_SERVICES = (
    "SERVICE",
    "WAITING",
    "HELD",
    "OLDEST",
    "BACKLOG",
    "JOBS/S",
    "ROWS/S",
    "ROWS/FORWARD",
    "WAIT P50",
    "WAIT P95",
    "TOTAL P50",
    "TOTAL P95",
    "REFUSED/S",
    "DEAD",
    "WORKERS",
    "PAUSED",
)
_SPARE_SERVICES = (
    "REFUSED/S",
    "ROWS/FORWARD",
    "WAIT P50",
    "DEAD",
    "ROWS/S",
    "WAIT P95",
    "TOTAL P50",
    "HELD",
    "PAUSED",
    "TOTAL P95",
    "OLDEST",
    "WORKERS",
)
"""Columns that a narrow terminal leaves out, the first one first."""

_WORKERS = (
    "WORKER",
    "SERVICE",
    "DEVICE",
    "STATE",
    "RUNNING",
    "ROWS/S",
    "BUSY",
    "ROWS/FORWARD",
    "PADDING",
    "JOBS",
    "ERRORS",
    "MEMORY",
    "LOADS/MIN",
    "AGE",
)
_SPARE_WORKERS = (
    "LOADS/MIN",
    "ERRORS",
    "PADDING",
    "ROWS/FORWARD",
    "JOBS",
    "MEMORY",
    "AGE",
    "DEVICE",
    "ROWS/S",
    "RUNNING",
    "SERVICE",
)
_NOTHING = ("",) * len(_SERVICES)


@dataclass(frozen=True, slots=True)
class Picture:
    """Contents of one frame. `clock`: time of day. `trouble`: why the look is not the newest, "" if it is."""

    look: Look
    paces: Mapping[str, Pace]
    server: str
    clock: str
    trouble: str = ""


def frame(picture: Picture, width: int | None, height: int | None = None) -> list[str]:
    """Returns the lines of one frame, none longer than `width`, and no more than `height` of them; None: any number."""
    lines = [cut(line, width) for line in _lines(picture, width)]
    if height is None or len(lines) <= height:
        return lines
    return [*lines[: max(0, height - 1)], cut(f"... {len(lines) - height + 1} more lines", width)][:height]


def _lines(picture: Picture, width: int | None) -> Iterator[str]:
    views = picture.look.views
    workers = len({worker.consumer for view in views for worker in view.workers})
    yield f"millstream top {picture.clock}  services {len(views)}, workers {workers}  {picture.server}"
    yield escape(picture.trouble)
    if views:
        yield from fit([_SERVICES, *_service_rows(picture)], width, _SPARE_SERVICES).split("\n")
    else:
        yield "no service is registered"
    rows = list(_worker_rows(picture))
    yield ""
    if rows:
        yield from fit([_WORKERS, *rows], width, _SPARE_WORKERS).split("\n")
    else:
        yield "no worker is alive"
    window_s = max((pace.window_s for pace in picture.paces.values()), default=0.0)
    yield ""
    yield f"rates and latencies of the last {window_s:.0f} s" if window_s else "rates and latencies need a second look"


def _service_rows(picture: Picture) -> Iterator[tuple[str, ...]]:
    for view, totals in zip(picture.look.views, picture.look.totals, strict=True):
        pace = picture.paces.get(view.name)
        yield _service_row(view, totals, pace)
        shown = [each for each in PRIORITIES if view.unsettled.get(each) or (pace and _had_jobs(pace, each))]
        yield from (_priority_row(view, each, pace) for each in shown)


def _service_row(view: ServiceView, totals: ServiceMetrics, pace: Pace | None) -> tuple[str, ...]:
    return _row(
        _SERVICES,
        {
            "SERVICE": view.name,
            "WAITING": str(view.depth),
            "HELD": str(view.in_flight),
            "OLDEST": age(view.oldest_ms),
            "BACKLOG": seconds(backlog_s(view, totals)),
            "JOBS/S": rate(pace.settled_per_s if pace else None),
            "ROWS/S": rate(pace.rows_per_s if pace else None),
            "ROWS/FORWARD": number(pace.rows_per_forward if pace else None, 1),
            "REFUSED/S": rate(pace.refused_per_s if pace else None),
            "DEAD": str(view.dead_letters),
            "WORKERS": str(len(view.workers)),
            "PAUSED": pause_text(view.paused),
        }
        | _latencies(pace, PRIORITIES),
    )


def _priority_row(view: ServiceView, priority: Priority, pace: Pace | None) -> tuple[str, ...]:
    return _row(
        _SERVICES,
        {"SERVICE": f"  {priority.value}", "WAITING": str(view.waiting[priority])} | _latencies(pace, [priority]),
    )


def _latencies(pace: Pace | None, priorities: Sequence[Priority]) -> dict[str, str]:
    if pace is None:
        return dict.fromkeys(("WAIT P50", "WAIT P95", "TOTAL P50", "TOTAL P95"), "-")
    wait, total = (merge(found[each] for each in priorities) for found in (pace.wait, pace.total))
    return {
        "WAIT P50": latency(wait, 0.5),
        "WAIT P95": latency(wait, 0.95),
        "TOTAL P50": latency(total, 0.5),
        "TOTAL P95": latency(total, 0.95),
    }


def _had_jobs(pace: Pace, priority: Priority) -> bool:
    return bool(pace.accepted_per_s[priority] or pace.total[priority].count)


def _worker_rows(picture: Picture) -> Iterator[tuple[str, ...]]:
    for view in picture.look.views:
        pace = picture.paces.get(view.name)
        for worker in sorted(view.workers, key=lambda each: (each.host, each.pid, each.consumer)):
            yield _worker_row(view.name, worker, pace.workers.get(worker.consumer) if pace else None)


def _worker_row(service: str, worker: WorkerView, pace: WorkerPace | None) -> tuple[str, ...]:
    rows_per_forward = worker.rows / worker.forwards if worker.forwards else None
    cells = {
        "WORKER": worker.consumer,
        "SERVICE": service,
        "DEVICE": worker.device or "-",
        "STATE": worker.state,
        "RUNNING": f"{worker.running} for {age(worker.running_ms)}" if worker.running else "-",
        "ROWS/S": rate(pace.rows_per_s if pace else None),
        "BUSY": f"{pace.busy:.0%}" if pace else "-",
        "ROWS/FORWARD": number(rows_per_forward, 1),
        "PADDING": number(worker.padding, 2),
        "JOBS": str(worker.jobs),
        "ERRORS": str(worker.errors),
        "MEMORY": memory(worker.memory),
        "LOADS/MIN": str(worker.loads_minute) if worker.memory else "-",
        "AGE": age(worker.age_ms or None),
    }
    return tuple(escape(cell) for cell in _row(_WORKERS, cells))


def _row(heading: Sequence[str], cells: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(cells.get(name, "") for name in heading)


def latency(found: HistogramView, share: float) -> str:
    """Returns a quantile of times as text such as 3.2ms, 45ms, 1.2s; a dash if there is none."""
    return figure_text.latency(found.quantile(share))


def record(picture: Picture) -> dict[str, object]:
    """Returns the frame as a JSON object: the record of `queue ls` of each service, its backlog and its pace."""
    services = []
    for view, totals in zip(picture.look.views, picture.look.totals, strict=True):
        pace = picture.paces.get(view.name)
        services.append(as_record(view) | {"backlog_s": backlog_s(view, totals), "pace": _pace_record(pace)})
    return {"server": picture.server, "services": services}


def _pace_record(pace: Pace | None) -> dict[str, object] | None:
    if pace is None:
        return None
    return {
        "window_s": pace.window_s,
        "accepted_per_s": dict(pace.accepted_per_s),
        "settled_per_s": pace.settled_per_s,
        "refused_per_s": pace.refused_per_s,
        "rows_per_s": pace.rows_per_s,
        "rows_per_forward": pace.rows_per_forward,
        "wait_ms": {priority: _quantiles(found) for priority, found in pace.wait.items()},
        "total_ms": {priority: _quantiles(found) for priority, found in pace.total.items()},
        "workers": {name: asdict(each) for name, each in pace.workers.items()},
    }


def _quantiles(found: HistogramView) -> dict[str, float | int | None]:
    return {"count": found.count, "p50": found.quantile(0.5), "p95": found.quantile(0.95), "p99": found.quantile(0.99)}
