"""Routes for whoever runs the gateway: liveness, readiness, metrics, and the backlog for autoscalers."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from millstream.broker.contract.errors import MillstreamError, UnknownService
from millstream.broker.contract.job import Json
from millstream.broker.queue.metrics import ServiceMetrics, backlog_s
from millstream.broker.queue.views import ServiceView
from millstream.gateway.api.bodies import write_answer
from millstream.gateway.api.errors import Refusal
from millstream.gateway.api.state import gateway_of, key_of

router = APIRouter()


@router.get("/healthz")
@router.get("/health")
async def healthz() -> Response:
    """Says that this process serves. It asks nobody: a queue that is away is no reason to restart it."""
    return PlainTextResponse("ok\n")


@router.get("/readyz")
async def readyz(request: Request, service: str = "") -> Response:
    """Says whether a worker of `service`, or by default of any one, could answer a call now."""
    try:
        readings = await gateway_of(request).readings.get()
        views = [each.view for each in readings if service in ("", each.view.name)]
        reason = "" if any(map(_takes_jobs, views)) else "no live worker"
    except MillstreamError:
        reason = "the queue's server cannot be reached"
    return PlainTextResponse(f"{reason or 'ok'}\n", 503 if reason else 200)


def _takes_jobs(view: ServiceView) -> bool:
    return view.paused is None and any(worker.state not in ("away", "draining") for worker in view.workers)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    try:
        page, kind = await asyncio.to_thread(gateway_of(request).write_metrics)
    except ImportError:
        raise Refusal(404, "no_metrics", 'metrics need the extra: pip install "millstream[metrics]"') from None
    return Response(page, media_type=kind)


@router.get("/admin/backlog")
async def backlogs(request: Request) -> Response:
    readings, key = await gateway_of(request).readings.get(), key_of(request)
    found = {each.view.name: _backlog(each.view, each.totals) for each in readings if key.allows(each.view.name)}
    return await write_answer(lambda: {"services": found})


@router.get("/admin/backlog/{name}")
async def backlog(request: Request, name: str) -> Response:
    readings = await gateway_of(request).readings.get()
    found = next((_backlog(each.view, each.totals) for each in readings if each.view.name == name), None)
    if found is None or not key_of(request).allows(name):
        raise UnknownService(f"no service {name[:80]!r}")
    return await write_answer(lambda: found)


def _backlog(view: ServiceView, totals: ServiceMetrics) -> dict[str, Json]:
    """Returns the figures that an autoscaler reads. `backlog_s` is always a number.

    If jobs wait and none has ever run, each counts as a second, so that the first worker is started.
    """
    known = backlog_s(view, totals)
    return {
        "backlog_s": round(float(view.depth) if known is None else known, 3),
        "waiting": view.depth,
        "in_flight": view.in_flight,
        "workers": len(view.workers),
        "oldest_s": None if view.oldest_ms is None else view.oldest_ms / 1000,
        "paused": view.paused is not None,
    }
