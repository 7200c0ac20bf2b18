"""Builds the application of the HTTP API: the routes of all families, their errors, and the guard around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

from millstream.broker.contract.errors import MillstreamError
from millstream.gateway.api import cohere, health, models, openai, services, tei
from millstream.gateway.api.bodies import to_json
from millstream.gateway.api.errors import CLIENT_GONE, Refusal, note, problem_of, shape_of
from millstream.gateway.api.gone import CallerGone
from millstream.gateway.api.guard import Guard
from millstream.gateway.api.keys import KeyRing
from millstream.gateway.api.state import Gateway

ROUTERS = (openai.router, models.router, cohere.router, tei.router, services.router, health.router)
"""All routes. A module of another family is added here."""


def make_app(gateway: Gateway) -> ASGIApp:
    """Returns the application. Raises ConfigError if the file of keys cannot be used."""
    settings = gateway.settings
    keys = KeyRing(settings.keys) if settings.keys else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await gateway.close()

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.gateway = gateway
    for router in ROUTERS:
        app.include_router(router)
    for kind in (MillstreamError, Refusal, HTTPException, CallerGone, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _failed)
    guarded = Guard(app, keys, settings.hosts, settings.origins)
    if not settings.origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=settings.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after", "x-should-retry"],
    )


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, CallerGone | ClientDisconnect):
        return Response(status_code=CLIENT_GONE)
    path = request.url.path
    problem, shape = problem_of(_as_refusal(error, path)), shape_of(path)
    note(problem, path, request.state.request_id)
    return Response(to_json(shape.write(problem)), shape.status(problem), problem.headers, "application/json")


def _as_refusal(error: Exception, path: str) -> Exception:
    """Returns the framework's own refusals, such as an unknown path, as ours."""
    if not isinstance(error, HTTPException):
        return error
    if error.status_code == 404:
        return Refusal(404, "unknown_path", f"no route {path[:200]!r}")
    if error.status_code == 405:
        return Refusal(405, "method_not_allowed", f"{path[:200]!r} has no such method")
    return Refusal(error.status_code, "http_error", str(error.detail))
