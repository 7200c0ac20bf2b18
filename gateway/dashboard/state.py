"""Objects that all routes share, and how a route gets them from its request."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from fastapi import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from millstream.broker.contract.errors import UnknownService
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.transport.connection import Connection
from millstream.gateway.dashboard.looks import Looks
from millstream.gateway.dashboard.rendering import Renderer
from millstream.gateway.dashboard.same_origin import COOKIE, Tokens, is_session, new_session
from millstream.gateway.dashboard.settings import Settings

_MOST_NOTICES = 100


class Notices:
    """The results of actions until their browsers show them on the next page, for the latest hundred browsers."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, session: str, text: str) -> None:
        with self._lock:
            self._texts[session] = text
            if len(self._texts) > _MOST_NOTICES:
                self._texts.popitem(last=False)

    def take(self, session: str) -> str:
        """Returns the notice and removes it; "" if there is none."""
        with self._lock:
            return self._texts.pop(session, "")


@dataclass(frozen=True, slots=True)
class Dashboard:
    """State that the routes share. `connection` and `prefix` name the server and its keys."""

    connection: Connection
    prefix: str
    settings: Settings
    looks: Looks
    renderer: Renderer
    tokens: Tokens = field(default_factory=Tokens)
    notices: Notices = field(default_factory=Notices)

    def keys(self, service: str) -> ServiceKeys:
        return ServiceKeys(service, self.prefix)

    def path(self, request: Request) -> str:
        """Returns the path and query of the request, for links to the same page."""
        query = f"?{request.url.query}" if request.url.query else ""
        return f"{request.scope['path']}{query}"

    def page(self, request: Request, template: str, **values: object) -> Response:
        """Returns a page that needs no look at the server."""
        session = request.cookies.get(COOKIE, "")
        fresh = not is_session(session)
        session = new_session() if fresh else session
        html = self.renderer.page(
            template,
            may_act=request.state.may_act,
            token=self.tokens.token(session),
            path=self.path(request),
            **values,
        )
        response = HTMLResponse(html)
        if fresh:
            response.set_cookie(
                COOKIE,
                session,
                path=self.settings.root_path or "/",
                secure=request.url.scheme == "https",
                httponly=True,
                samesite="strict",
            )
        return response

    def state_page(self, request: Request, template: str, service: str = "", **values: object) -> Response:
        """Returns a page of the last look, of `service` if it is not empty; one with status 503 if the look failed.

        Raises UnknownService.
        """
        look = self.looks.last()
        if look.found is None:
            return HTMLResponse(self.renderer.error(503, look.error, self.path(request)), 503, {"Retry-After": "2"})
        view = look.found.view(service) if service else None
        if service and view is None:
            raise UnknownService(f"no service {service!r} here", hint="see the list of services")
        # Only a whole page shows the notice: a part that is fetched again would replace it at once.
        whole = "hx-request" not in request.headers
        notice = self.notices.take(request.cookies.get(COOKIE, "")) if whole else ""
        return self.page(request, template, look=look, found=look.found, view=view, notice=notice, **values)

    def done(self, request: Request, text: str, path: str) -> Response:
        """Returns the answer to an action: the page at `path` with `text`. Looks at the server again before."""
        self.looks.again()
        self.notices.put(request.cookies.get(COOKIE, ""), text)
        return RedirectResponse(f"{self.settings.root_path}{path}", 303)


def dashboard_of(request: Request) -> Dashboard:
    dashboard: Dashboard = request.app.state.dashboard
    return dashboard
