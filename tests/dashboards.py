"""A dashboard for tests: its application over looks that a test sets, and a browser's view of it."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from starlette.testclient import TestClient
from workers import spec

from millstream.broker.contract.job import Priority
from millstream.broker.queue.diagnosis import Finding, diagnose
from millstream.broker.queue.examination import Examination
from millstream.broker.queue.supervisors import SupervisorState, SupervisorView
from millstream.broker.queue.views import ServiceView, WorkerView
from millstream.broker.transport.connection import Connection
from millstream.gateway.dashboard.app import make_app
from millstream.gateway.dashboard.history import History
from millstream.gateway.dashboard.looks import Look
from millstream.gateway.dashboard.rendering import Renderer
from millstream.gateway.dashboard.settings import Settings, make_settings
from millstream.gateway.dashboard.sign_in import SignIn
from millstream.gateway.dashboard.state import Dashboard
from millstream.gateway.dashboard.traffic import Traffic
from millstream.gateway.dashboard.users import User

LOCAL = make_settings("127.0.0.1", has_users=False)
WORKER = WorkerView(
    "w1", "ready", "h", 1, "cuda:0", "weights", 0, 5_000, 3, 1_500, "was killed by SIGKILL", 10, 40, 5, 100, 110, 1, 0,
    2_500, 2048, 0, 1, {"rows": 2}, memory=310_000_000, loads=9, loads_minute=2,
)  # fmt: skip
NONE: dict[Priority, int] = dict.fromkeys(Priority, 0)
DOCS = ServiceView("docs", NONE | {Priority.REALTIME: 4}, {"w1": 3}, 1, 9_500, [WORKER], 2, None, {"queue_full": 7})


def look(*views: ServiceView, findings: Sequence[Finding] | None = None) -> Look:
    """A look that found these services; what doctor says of them, if `findings` are not given."""
    # A name that is none cannot be registered, but another program can write it to the server.
    specs = {view.name: spec(view.name) for view in views if re.fullmatch(r"[\w.-]+", view.name)}
    found = (
        diagnose([(specs[view.name], view) for view in views if view.name in specs], [])
        if findings is None
        else findings
    )
    traffic = dict.fromkeys((view.name for view in views), Traffic(12.5, 8.25, 33.0, 4.5, 1_250.0))
    return Look(1_700_000_000.0, Examination(views, specs, [], found), traffic=traffic)


def supervisor(past: str, failures: int = 4) -> SupervisorView:
    return SupervisorView(SupervisorState("h", 7, 2, 1, failures, past), age_ms=100, clock_ms=0)


@dataclass
class Shown:
    """Looks that are what a test says."""

    looked: Look
    history: History = field(default_factory=History)

    def last(self) -> Look:
        return self.looked

    def again(self) -> Look:
        return self.looked


def browser(
    looked: Look | None = None,
    *,
    url: str = "redis://127.0.0.1:1",
    settings: Settings = LOCAL,
    users: Mapping[str, User] | None = None,
    headers: Mapping[str, str] | None = None,
) -> TestClient:
    """A browser that keeps cookies and follows no redirects, of a dashboard that shows `looked`."""
    connection = Connection(url)
    dashboard = Dashboard(
        connection, "ms", settings, Shown(looked or look(DOCS)), Renderer(connection.safe_url, settings.root_path)
    )
    app = make_app(dashboard, None if users is None else SignIn(users))
    return TestClient(app, "http://127.0.0.1:8870", follow_redirects=False, headers=dict(headers or {}))


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def token_of(page: str) -> str:
    """The token in the first form of a page."""
    found = re.search(r'name="token" value="([0-9a-f]{64})"', page)
    assert found, page
    return found[1]
