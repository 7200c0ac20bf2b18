"""The first thing that each request meets: paths, host names, users, rights, and the headers of each answer.

Everything is refused that is not allowed here, so a route that is added later is guarded, too.
"""

from __future__ import annotations

import time

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millstream.gateway.addresses import host_name, is_foreign
from millstream.gateway.dashboard.rendering import Renderer
from millstream.gateway.dashboard.settings import Settings
from millstream.gateway.dashboard.sign_in import SignIn
from millstream.gateway.dashboard.users import Role

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of all answers: nothing inline, nothing from elsewhere."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_READING = ("GET", "HEAD")


class Guard:
    """ASGI middleware. `sign_in` is None if no passwords are set: then each request may do all that settings allow."""

    def __init__(self, app: ASGIApp, settings: Settings, sign_in: SignIn | None, renderer: Renderer) -> None:
        self._app = app
        self._settings = settings
        self._sign_in = sign_in
        self._renderer = renderer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Neither websockets nor anything else: only the lifespan goes on.
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        answer = await self._refusal(_rooted(scope, self._settings.root_path)) or self._app
        await answer(scope, receive, _with_headers(send))

    async def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = self._settings.hosts
        if hosts and host_name(headers.get("host", "")) not in hosts:
            return PlainTextResponse("unknown host name: start the dashboard with --allowed-host NAME\n", 421)
        if scope["path"] == f"{self._settings.root_path}/healthz":
            return None
        role = await self._role(headers)
        if isinstance(role, Response):
            return role
        may_act = role == "operator" and not self._settings.read_only
        scope.setdefault("state", {})["may_act"] = may_act
        if scope["method"] in _READING:
            return None
        if not may_act:
            return self._error(403, "You may look, but not act.")
        if is_foreign(headers.get("sec-fetch-site", ""), headers.get("origin", ""), headers.get("host", ""), hosts):
            return self._error(403, "This request came from another site's page. Nothing was changed.")
        return None

    async def _role(self, headers: Headers) -> Role | Response:
        if self._sign_in is None:
            return "operator"
        given = headers.get("authorization", "")
        if user := self._sign_in.remembered(given):
            return user.role
        found = await run_in_threadpool(self._sign_in.check, given, time.monotonic())
        if found == "too many":
            return self._error(429, "Too many wrong passwords. Try again in a minute.", {"Retry-After": "60"})
        if found == "unknown":
            challenge = {"WWW-Authenticate": 'Basic realm="millstream", charset="UTF-8"'}
            return self._error(401, "A name and a password are needed.", challenge)
        return found.role

    def _error(self, status: int, text: str, headers: dict[str, str] | None = None) -> Response:
        return HTMLResponse(self._renderer.error(status, text), status, headers)


def _rooted(scope: Scope, root_path: str) -> Scope:
    """Sets the scope's root path. A proxy may have removed it from the path, or not: both are understood."""
    if root_path:
        path: str = scope["path"]
        scope["root_path"] = root_path
        if path != root_path and not path.startswith(f"{root_path}/"):
            scope["path"] = root_path + path
        elif path == root_path:
            scope["path"] = f"{root_path}/"
    return scope


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            # Pages hold the state of this moment, and a token; only files of one version may be kept.
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return send_with_headers
