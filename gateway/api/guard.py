"""The first thing that each request meets: host names, keys, rights, room, ids, and the headers of each answer.

A path that is added later needs a key like all others: OPEN lists those that need none.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millstream.gateway.addresses import host_name, is_foreign
from millstream.gateway.api.bodies import to_json
from millstream.gateway.api.errors import Refusal, problem_of, shape_of
from millstream.gateway.api.keys import LOCAL, Key, KeyRing
from millstream.gateway.api.outage import Places

OPEN = frozenset({"/healthz", "/readyz", "/health"})
"""Paths that need no key: probes of an orchestrator have none."""

VIEWED = ("/admin/", "/metrics")
"""Begins of paths for viewers and admins."""

MOST_OPEN = 8_192
"""Requests that one process serves at once."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


class Guard:
    """ASGI middleware. `keys` is None if whoever connects may do all: then only this host can.

    `hosts` and `origins` are as in Settings.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyRing | None, hosts: frozenset[str], origins: Collection[str] = ()
    ) -> None:
        self._app, self._keys, self._hosts, self._origins = app, keys, hosts, origins
        self._open = Places(MOST_OPEN, "overloaded", f"this process serves {MOST_OPEN} requests already")
        self._by_key: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Neither websockets nor anything else: only the lifespan goes on.
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        send = _with_headers(send, request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            self._check_source(headers)
            key = self._find_key(scope["path"], headers)
            scope["state"]["key"] = key
            with self._open.take(), self._of_key(key):
                await self._app(scope, receive, send)
        except Refusal as refusal:
            await _refuse(refusal, scope["path"])(scope, receive, send)

    def _check_source(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts and host_name(host) not in self._hosts:
            raise Refusal(421, "unknown_host", "unknown host name: start the gateway with --allowed-host NAME")
        # A browser needs no key on this host, so its pages of other sites must not call.
        site, origin = headers.get("sec-fetch-site", ""), headers.get("origin", "")
        if self._keys is None and origin not in self._origins and is_foreign(site, origin, host, self._hosts):
            raise Refusal(403, "foreign_origin", "this request came from another site's page")

    def _find_key(self, path: str, headers: Headers) -> Key:
        if self._keys is None or path in OPEN:
            return LOCAL
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = self._keys.find(given.strip(), time.monotonic()) if scheme.lower() == "bearer" else None
        if key is None:
            raise Refusal(401, "invalid_api_key", "no valid API key: send `Authorization: Bearer KEY`")
        if not (key.may_view if path.startswith(VIEWED) else key.may_call):
            raise Refusal(403, "forbidden", f"this key is of the role {key.role}, which may not do this")
        return key

    @contextmanager
    def _of_key(self, key: Key) -> Iterator[None]:
        """Counts the requests of a key in its block. Raises Refusal if there are as many as it allows."""
        if key.max_concurrent is None:
            yield
            return
        count = self._by_key.get(key.sha256, 0)
        if count >= key.max_concurrent:
            message = f"this key allows {key.max_concurrent} requests at once"
            raise Refusal(429, "too_many_requests", message, retry_after=1.0)
        self._by_key[key.sha256] = count + 1
        try:
            yield
        finally:
            self._by_key[key.sha256] -= 1
            if not self._by_key[key.sha256]:
                del self._by_key[key.sha256]


def _refuse(refusal: Refusal, path: str) -> Response:
    problem, shape = problem_of(refusal), shape_of(path)
    content = to_json(shape.write(problem))
    return Response(content, shape.status(problem), problem.headers, "application/json")


def _with_headers(send: Send, request_id: str) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = request_id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers
