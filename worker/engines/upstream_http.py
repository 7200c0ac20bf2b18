"""HTTP requests in flight to one server, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import NamedTuple, cast

import httpx

from millstream.broker.contract.errors import described
from millstream.broker.contract.job import Json
from millstream.worker.engines.upstream_wire import Call, Fault, Kind, broken, error_of, fault_of

log = logging.getLogger(__name__)

CONNECT_S = 5.0
"""Seconds in which a connection must be made."""

HEALTH_S = 5.0
"""Seconds in which a server must answer whether it is there."""

MOST_BYTES = 64 * 1024 * 1024
"""Bytes of an answer above which it is not read on."""

MOST_LINE = 8 * 1024 * 1024
"""Bytes of one event of a stream above which the answer is not read on."""

MOST_ERROR = 64 * 1024
"""Bytes of an error's answer that are read."""

METRICS_S = 1.0
"""Seconds between two looks at the server's metrics."""

_QUEUE_GAUGES = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred", "te_queue_size")
"""Gauges of requests that wait inside a server: of vLLM, SGLang, llama-server and TEI."""

_TRANSPORT = (httpx.TransportError, httpx.StreamError, ssl.SSLError, OSError)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server: its URL, the key that it asks for, and the path that shows whether it lives.

    `stall_s`: seconds without a byte after which a request counts as broken.
    """

    url: str
    key: str = ""
    health: str = "/models"
    stall_s: float = 120.0

    @property
    def root(self) -> str:
        """The URL without the version of its API."""
        return self.url.removesuffix("/v1")

    def client(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(self.stall_s, connect=CONNECT_S, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # No proxy and no redirect: the key goes to the server that the file names.
        return httpx.AsyncClient(
            headers=headers,
            timeout=timeout,
            limits=limits,
            verify=ssl.create_default_context(),
            trust_env=False,
            follow_redirects=False,
        )


class Began(NamedTuple):
    """The server began to answer, `seconds` after the request."""

    seconds: float


class Chunk(NamedTuple):
    """One event of a stream."""

    value: Mapping[str, Json]


class Ended(NamedTuple):
    """The answer is complete. `value`: the whole answer, if it is no stream."""

    value: Json


class Failed(NamedTuple):
    """The request ended without its answer. `began`: monotonic seconds at which it began."""

    fault: Fault
    began: float


News = Began | Chunk | Ended | Failed


class Http:
    """Requests in flight, by number. `notify` is called, in any thread, when there is something to `take`."""

    def __init__(self, endpoint: Endpoint, notify: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._notify = notify
        self._news: deque[tuple[int, News]] = deque()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._client: httpx.AsyncClient | None = None
        self.queued = 0
        """Requests that waited inside the server at the last look; 0 if it has no metrics, or after it was used."""
        self._thread = threading.Thread(target=self._run, name="upstream", daemon=True)
        self._thread.start()
        self._submit(self._watch_metrics())

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _submit(self, work: Coroutine[object, object, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop)

    # -- the engine's side -------------------------------------------------------------------------------------

    def start(self, number: int, call: Call) -> None:
        """Sends a request. Its news come under `number`; the last of them is Ended or Failed."""
        self._loop.call_soon_threadsafe(self._start, number, call)

    def cancel(self, number: int) -> None:
        """Closes a request's connection, so that the server ends it. News of it may still come."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel, number)

    def probe(self, tell: Callable[[str], None]) -> None:
        """Asks whether the server is there, and calls `tell`, in another thread, with "" or the reason why not."""
        self._submit(self._probe(tell))

    def take(self) -> list[tuple[int, News]]:
        """Returns the news since the last call, in order."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def close(self) -> None:
        """Ends all requests and the thread."""
        with suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        self._thread.join(5.0)

    # -- in the thread -----------------------------------------------------------------------------------------

    async def _close(self) -> None:
        current = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not current]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client:
            await self._client.aclose()
        await self._loop.shutdown_asyncgens()
        self._loop.stop()

    def _http(self) -> httpx.AsyncClient:
        # Made here, since its connections belong to this thread's loop.
        self._client = self._client or self._endpoint.client()
        return self._client

    def _start(self, number: int, call: Call) -> None:
        task = self._loop.create_task(self._exchange(number, call))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    def _cancel(self, number: int) -> None:
        if task := self._tasks.get(number):
            task.cancel()

    def _add(self, number: int, news: News) -> None:
        self._news.append((number, news))
        self._notify()

    async def _exchange(self, number: int, call: Call) -> None:
        began = time.monotonic()
        try:
            ended = await self._answer(number, call, began)
            self._add(number, ended)
        except Fault as fault:
            self._add(number, Failed(fault, began))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # The rows of a request must learn that it ended, by whatever error.
            log.debug("a request failed", exc_info=error)
            self._add(number, Failed(_fault(error), began))

    async def _answer(self, number: int, call: Call, began: float) -> Ended:
        content = json.dumps(dict(call.body), ensure_ascii=False).encode(errors="replace")
        headers = {"content-type": "application/json", "accept": "text/event-stream, application/json"}
        async with self._http().stream(
            "POST", self._endpoint.url + call.path, content=content, headers=headers
        ) as response:
            if response.status_code != 200:
                body = await _body(response, MOST_ERROR, cut=True)
                raise fault_of(response.status_code, body, response.headers.get("retry-after"))
            if not call.streams:
                body = await _body(response, MOST_BYTES)
                self._add(number, Began(time.monotonic() - began))
                return Ended(_parsed(body))
            is_first = True
            async with aclosing(_events(response)) as events:
                async for value in events:
                    if is_first:
                        self._add(number, Began(time.monotonic() - began))
                        is_first = False
                    if fault := error_of(value):
                        raise fault
                    self._add(number, Chunk(value))
        return Ended(None)

    async def _probe(self, tell: Callable[[str], None]) -> None:
        reason = ""
        try:
            response = await self._http().get(self._endpoint.url + self._endpoint.health, timeout=HEALTH_S)
            # Any other answer shows that a server is there: some have no such route.
            if response.status_code in (502, 503, 504):
                reason = f"HTTP {response.status_code}"
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - every failure says the same: no server there
            reason = _fault(error).message
        tell(reason)
        self._notify()

    async def _watch_metrics(self) -> None:
        """Reads the length of the server's own queue, as long as it says one."""
        while True:
            await asyncio.sleep(METRICS_S)
            try:
                response = await self._http().get(self._endpoint.root + "/metrics", timeout=HEALTH_S)
            except asyncio.CancelledError:
                raise
            except Exception:  # noqa: BLE001 - a server that is away says so to the next request
                self.queued = 0
                continue
            if response.status_code in (404, 405, 501):
                return
            self.queued = queued(response.text) if response.status_code == 200 else 0


def queued(metrics: str) -> int:
    """Returns the requests that wait inside a server, by its metrics in Prometheus' text format; 0 if they say none."""
    total = 0.0
    for line in metrics.splitlines():
        if line.startswith(_QUEUE_GAUGES):
            with suppress(ValueError, IndexError):
                number = float(line.rsplit(" ", 1)[1])
                total += number if 0 <= number < 1e9 else 0
    return int(total)


def _fault(error: Exception) -> Fault:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Fault(Kind.AWAY, f"no connection: {error or type(error).__name__}")
    if isinstance(error, httpx.TimeoutException):
        return broken(f"nothing came for too long ({type(error).__name__})")
    if isinstance(error, _TRANSPORT):
        return broken(f"its answer broke off: {described(error)}")
    return broken(described(error))


def _chunks(response: httpx.Response) -> AsyncGenerator[bytes]:
    # It is a generator, which has to be closed before the loop is.
    return cast("AsyncGenerator[bytes]", response.aiter_bytes())


async def _body(response: httpx.Response, most: int, *, cut: bool = False) -> bytes:
    """The whole body. Raises Fault if it has more than `most` bytes, unless `cut`: then its begin is returned."""
    body = bytearray()
    async with aclosing(_chunks(response)) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > most:
                if cut:
                    break
                raise broken(f"its answer has more than {most} bytes")
    return bytes(body)


def _parsed(body: bytes) -> Json:
    try:
        return cast(Json, json.loads(body))
    except (ValueError, RecursionError) as error:
        raise broken(f"its answer is not JSON: {error}") from error


async def _events(response: httpx.Response) -> AsyncGenerator[Mapping[str, Json]]:
    """Yields the objects of a stream: of server-sent events until [DONE], or one a line. Raises Fault."""
    rest = bytearray()
    async with aclosing(_chunks(response)) as chunks:
        async for chunk in chunks:
            rest += chunk
            *lines, rest = rest.split(b"\n")
            if max(map(len, (rest, *lines))) > MOST_LINE:
                raise broken(f"an event of its answer has more than {MOST_LINE} bytes")
            for line in lines:
                data = _data(bytes(line))
                if data == b"[DONE]":
                    return
                if data:
                    yield _object(data)
    if (data := _data(bytes(rest))) and data != b"[DONE]":
        yield _object(data)


def _data(line: bytes) -> bytes:
    """The JSON of a line; b"" for comments and for the other fields of server-sent events."""
    line = line.strip()
    if line.startswith(b"data:"):
        return line[5:].strip()
    return line if line.startswith(b"{") else b""


def _object(data: bytes) -> Mapping[str, Json]:
    value = _parsed(data)
    if not isinstance(value, dict):
        raise broken("an event of its answer is no object")
    return value
