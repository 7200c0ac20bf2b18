"""Builds the dashboard's application: routes, static files, error pages, and the guard around all of them."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from millstream.broker.contract.errors import MillstreamError
from millstream.client.openai.failures import status_of
from millstream.gateway.dashboard import actions, pages
from millstream.gateway.dashboard.guard import Guard
from millstream.gateway.dashboard.sign_in import SignIn
from millstream.gateway.dashboard.state import Dashboard, dashboard_of

MOST_BYTES = 65_536
"""Bytes of a request's body that are read at most."""


def make_app(dashboard: Dashboard, sign_in: SignIn | None = None) -> ASGIApp:
    """Returns the application. `sign_in`: users must sign in; None if everybody who can connect may act."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, max_body_size=MOST_BYTES)
    app.state.dashboard = dashboard
    app.include_router(pages.router)
    app.include_router(actions.router)
    app.mount("/static", Files(packages=[("millstream.gateway.dashboard", "static")]), name="static")
    app.add_exception_handler(MillstreamError, _failed)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    return Guard(app, dashboard.settings, sign_in, dashboard.renderer)


class Files(StaticFiles):
    """The static files, which a browser may keep: their links change when the files do."""

    def file_response(self, *args: object, **kwargs: object) -> Response:
        response: Response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers["Cache-Control"] = "private, max-age=31536000, immutable"
        return response


def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, MillstreamError)
    status = status_of(error)
    return _error(request, status, str(error))


def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        known = isinstance(error.detail, str)
        return _error(request, error.status_code, error.detail if known else "", dict(error.headers or {}))
    return _error(request, 400, "The request is not valid.")


def _error(request: Request, status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    dashboard = dashboard_of(request)
    # Only what is the server's fault passes by itself, and only a page that shows something may be asked for again.
    path = dashboard.path(request) if status >= 500 and request.method == "GET" else ""
    return HTMLResponse(dashboard.renderer.error(status, text, path), status, headers)
