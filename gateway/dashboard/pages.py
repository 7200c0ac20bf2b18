"""The pages that show something. They read the last look, and of dead letters what the server holds.

The routes are plain functions: the framework runs them in threads, off the event loop, since some ask the server.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from millstream.broker.queue.deadletters import DeadLetters
from millstream.broker.transport.connection import translated
from millstream.gateway.dashboard.state import Dashboard, dashboard_of
from millstream.gateway.dashboard.traffic import SERIES

router = APIRouter()
Shared = Annotated[Dashboard, Depends(dashboard_of)]

LETTERS = 50
"""Dead letters of one page."""


@router.get("/healthz")
def healthz() -> Response:
    """Tells that this process serves. It asks no server: one that is away is no reason to restart the dashboard."""
    return PlainTextResponse("ok\n")


@router.get("/")
def services(request: Request, dashboard: Shared) -> Response:
    return dashboard.state_page(request, "services.html")


@router.get("/workers")
def workers(request: Request, dashboard: Shared) -> Response:
    return dashboard.state_page(request, "workers.html")


@router.get("/services/{service}")
def service(request: Request, dashboard: Shared, service: str) -> Response:
    return dashboard.state_page(request, "service.html", service)


@router.get("/services/{service}/history")
def history(dashboard: Shared, service: str) -> Response:
    """Returns the figures of the last minutes as JSON: `names`, and `series`, of which the first are the times."""
    return JSONResponse({"names": SERIES, "series": dashboard.looks.history.series(service, SERIES)})


@router.get("/services/{service}/dead")
def dead(request: Request, dashboard: Shared, service: str, before: str | None = None) -> Response:
    with translated(dashboard.connection.safe_url):
        letters = DeadLetters.open(dashboard.connection, dashboard.keys(service))
        page, total = letters.page(LETTERS, before or None), len(letters)
    older = page[-1].id if len(page) == LETTERS else ""
    return dashboard.state_page(request, "dead.html", service, letters=page, total=total, older=older, before=before)


@router.get("/services/{service}/dead/{letter_id}")
def letter(request: Request, dashboard: Shared, service: str, letter_id: str, payload: bool = False) -> Response:
    """Shows one dead letter, and its payload if that is asked for by somebody who may act."""
    with translated(dashboard.connection.safe_url):
        found = DeadLetters.open(dashboard.connection, dashboard.keys(service)).find(letter_id)
    fields = found.texts()
    body = fields.pop("body", "")
    shown = body if payload and request.state.may_act else None
    return dashboard.page(request, "letter.html", service=service, letter=found, fields=fields, payload=shown)
