"""Client for asyncio: the same calls over the same channel, awaited. Cancelling an awaiting task cancels its jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.embedding import EmbedOptions, Encoding, InputType, Truncate
from millstream.broker.contract.errors import DeadlineExceeded, InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import BY_OP, EMBED, RERANK
from millstream.broker.contract.rerank import RerankOptions, Scores
from millstream.broker.contract.scalars import plain
from millstream.client.asker import Question
from millstream.client.calls import NO_HITS, CallOptions, Calls, PriorityName, frozen, vectors_of
from millstream.client.channel.loop_calls import arrival, listener
from millstream.client.detached import Detached, Entering
from millstream.client.handle import CANCEL_S, Handle
from millstream.client.job_terms import Progress, waits_until
from millstream.client.local import START_S, Local
from millstream.client.mapping import Results, check_map, chunking
from millstream.client.rerank import Ranking, check_top_n, copied
from millstream.client.result import Embeddings
from millstream.client.row_results import RowOutcome

T = TypeVar("T")


class AsyncHandle:
    """Handle of a submitted call, awaitable: `await handle` is `await handle.result()`."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self.id = handle.id

    @property
    def rows_done(self) -> int:
        """Number of rows that have their outcome, for a progress bar."""
        return self._handle.rows_done

    def __await__(self) -> Generator[Any, None, Embeddings | list[Json]]:
        return self.result().__await__()

    async def result(self, timeout: float | None = None) -> Embeddings | list[Json]:
        """Does as Handle.result. Cancelling the awaiting task cancels the call."""
        await self._settled(timeout)
        return self._handle.result(0)

    async def outcomes(self, timeout: float | None = None) -> list[RowOutcome]:
        """Does as Handle.outcomes. Cancelling the awaiting task cancels the call."""
        await self._settled(timeout)
        return self._handle.outcomes(0)

    async def cancel(self) -> bool:
        """Does as Handle.cancel."""
        reported = _Changed()
        cancelling = self._handle.begin_cancel(listener(reported.set))
        await reported.wait(CANCEL_S if cancelling.asked else 0.0)
        return cancelling.result()

    def cancel_soon(self) -> None:
        """Does as Handle.cancel_soon."""
        self._handle.cancel_soon()

    async def _settled(self, timeout: float | None) -> None:
        until = waits_until(timeout)
        try:
            if await _first_ready([self._handle], until) is None:
                raise DeadlineExceeded(f"no result within {timeout} s of waiting", phase="total")
        except asyncio.CancelledError:
            self._handle.cancel_soon()
            raise


async def _first_ready(handles: Sequence[Handle], until: float | None = None) -> int | None:
    """Waits for a complete call and returns its index in `handles`; None if `until` (monotonic seconds) comes first."""
    changed = _Changed()
    wake = listener(changed.set)
    try:
        for handle in handles:
            handle.listen(wake)
        while True:
            for place, handle in enumerate(handles):
                if handle.ready:
                    return place
            now = time.monotonic()
            if until is not None and now >= until:
                return None
            for handle in handles:
                handle.expire()
            ends = [end for handle in handles if (end := handle.expires_at) is not None]
            moments = ends if until is None else [*ends, until]
            await changed.wait(max(0.0, min(moments) - now) if moments else None)
    finally:
        for handle in handles:
            handle.unlisten(wake)


class _Changed:
    """Event for one waiting task, with a timeout. Costs half of asyncio.Event, and every awaited call uses one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Sets the event and wakes the task. Must be called in the loop."""
        self._set = True
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, timeout: float | None) -> None:
        """Waits for the event, at most `timeout` seconds; returns at once if it was set since the last wait."""
        if not self._set:
            self._waiter = self._loop.create_future()
            timer = None if timeout is None else self._loop.call_later(timeout, self.set)
            try:
                await self._waiter
            finally:
                if timer:
                    timer.cancel()
        self._set = False


class AsyncClient:
    """Client for asyncio, with the same arguments and errors as Client. Thousands of calls may be awaited at once.

    Safe to use from several event loops. Its own threads talk to the server, so no call blocks the loop.
    """

    _local: Local | None = None

    def __init__(self, url: str | None = None, *, prefix: str | None = None) -> None:
        self._calls = Calls(url, prefix)

    @classmethod
    async def local(
        cls,
        config: Path | str = "config.yaml",
        *,
        data_dir: Path | str | None = None,
        replace: bool = False,
        timeout: float | None = START_S,
    ) -> Self:
        """Does as Client.local: `async with await AsyncClient.local("config.yaml") as client`."""
        stack = await asyncio.to_thread(Local.start, config, data_dir=data_dir, replace=replace, timeout=timeout)
        client = cls(stack.url, prefix=stack.prefix)
        client._local = stack
        return client

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        service: str | None = None,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        truncate: Truncate | None = None,
        tenant: str = "",
        input_type: InputType | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        encoding: Encoding = "float32",
    ) -> Embeddings:
        """Does as Client.embed."""
        texts = cast(Sequence[str], plain(texts))
        single = isinstance(texts, str)
        options = EmbedOptions(truncate, input_type, prompt, dimensions, normalize, encoding).json()
        rows = cast(Sequence[Json], [texts] if single else texts)
        handle = await self._start(service, rows, CallOptions(priority, timeout, wait, tenant, options, EMBED.op))
        return vectors_of(await AsyncHandle(handle).result(), single)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        return_documents: bool = False,
        service: str | None = None,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        truncate: Truncate | None = None,
        tenant: str = "",
        scores: Scores | None = None,
        instruction: str | None = None,
    ) -> Ranking:
        """Does as Client.rerank."""
        check_top_n(top_n)
        options = RerankOptions(query, scores, instruction, truncate).json()
        texts = copied(documents)
        opts = CallOptions(priority, timeout, wait, tenant, options, RERANK.op)
        handle = await self._start(service, cast(Sequence[Json], texts), opts)
        return Ranking.of(await AsyncHandle(handle).result(), top_n, texts if return_documents else None)

    async def submit(
        self,
        service: str,
        inputs: Sequence[Json],
        *,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        tenant: str = "",
        **options: Json,
    ) -> AsyncHandle:
        """Does as Client.submit."""
        return AsyncHandle(await self._start(service, inputs, CallOptions(priority, timeout, wait, tenant, options)))

    async def call(
        self,
        service: str,
        payload: object,
        *,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        tenant: str = "",
    ) -> Any:
        """Does as Client.call."""
        rows = cast(Sequence[Json], [payload])
        handle = await self._start(service, rows, CallOptions(priority, timeout, wait, tenant))
        return (await AsyncHandle(handle).result())[0]

    async def map(
        self,
        service: str,
        inputs: Iterable[Json] | AsyncIterable[Json],
        *,
        window: int = 2_048,
        ordered: bool = True,
        priority: PriorityName = "batch",
        tenant: str = "",
        results: Results = "values",
        **options: Json,
    ) -> AsyncGenerator[Any, None]:
        """Does as Client.map, and takes async iterables too.

        To cancel the rest at once, call `aclose` of the generator, or use contextlib.aclosing.
        """
        window = check_map(window, results)
        opts = CallOptions(priority, None, True, tenant, options)
        count, size = chunking(window)
        progress = Progress()
        under_way: list[tuple[int, Handle]] = []
        first = 0
        try:
            async for rows in _chunks(inputs, size):
                under_way.append((first, await self._start(service, rows, opts, progress)))
                first += len(rows)
                if len(under_way) == count:
                    async for pair in _collected(under_way, ordered, results):
                        yield pair if not ordered else pair[1]
            while under_way:
                async for pair in _collected(under_way, ordered, results):
                    yield pair if not ordered else pair[1]
        finally:
            for _, handle in under_way:
                handle.cancel_soon()

    async def submit_detached(
        self,
        service: str,
        inputs: Sequence[Json],
        *,
        priority: PriorityName = "batch",
        timeout: float | None = None,
        tenant: str = "",
        idempotency_key: str | None = None,
        **options: Json,
    ) -> Detached:
        """Does as Client.submit_detached. The methods of Detached block: call them with asyncio.to_thread."""
        opts = CallOptions(priority, timeout, True, tenant, options)
        opts = opts.checked()
        until = opts.until(time.monotonic())
        rows, opts = frozen(inputs, opts)
        spec = await self._spec(service, until)
        request = self._calls.detached_request(spec, rows, opts, until, idempotency_key)
        try:
            return await _entered(request.begin(self._calls, request.per_job))
        except InvalidRequest:
            per_job = await self._in_thread(request.accepted_per_job, self._calls)
            if per_job in (None, request.per_job):
                raise
            return await _entered(request.begin(self._calls, per_job))

    def job(self, job_id: str) -> Detached:
        """Does as Client.job. The methods of Detached block: call them with asyncio.to_thread."""
        return Detached.find(self._calls, job_id)

    async def close(self) -> None:
        """Does as Client.close."""
        await self._in_thread(self._calls.close)
        if self._local:
            await self._in_thread(self._local.stop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _start(
        self, service: str | None, inputs: Sequence[Json], opts: CallOptions, progress: Progress | None = None
    ) -> Handle:
        """Does as Calls.start, but awaits the server instead of blocking a thread."""
        opts = opts.checked()
        began = time.monotonic()
        until = opts.until(began)
        services = self._calls.services
        name = service or services.known_only(BY_OP[opts.op].type)
        spec = services.known(name) if name else None
        if spec is None or spec.runtime.enable_cache:
            # The caller may change its inputs while this waits for the server.
            inputs, opts = frozen(inputs, opts)
        if name is None:
            name = await _answer(services.ask_only(BY_OP[opts.op].type), until)
        if spec is None:
            spec = await self._spec(name, until)
        cached = spec.runtime.enable_cache
        hits = await arrival(partial(self._calls.read_cache_soon, spec, inputs, opts)) if cached else NO_HITS
        return self._calls.begin(spec, inputs, opts, hits, began, progress)

    async def _spec(self, service: str, until: float | None) -> ServiceSpec:
        """Does as Services.read."""
        services = self._calls.services
        return services.known(service) or (await _answer(services.ask(service), until)).spec

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._calls.executor, partial(function, *args))


async def _entered(entering: Entering) -> Detached:
    """Does as Entering.accepted."""
    changed, acceptance = _Changed(), entering.acceptance
    acceptance.listen(listener(changed.set))
    try:
        while not acceptance.over:
            await changed.wait(max(0.0, acceptance.ends_at - time.monotonic()))
        # The acceptance is over, so this does not block.
        return entering.accepted()
    except BaseException:
        entering.give_up()
        raise


async def _answer(question: Question[T], until: float | None) -> T:
    """Does as Question.wait, then Question.answer."""
    changed = _Changed()
    wake = listener(changed.set)
    question.future.add_done_callback(lambda future: wake())
    await changed.wait(question.wait_s(until))
    return question.answer()


async def _chunks(inputs: Iterable[Json] | AsyncIterable[Json], size: int) -> AsyncIterator[list[Json]]:
    chunk: list[Json] = []
    async for row in _each(inputs):
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def _each(inputs: Iterable[Json] | AsyncIterable[Json]) -> AsyncIterator[Json]:
    if isinstance(inputs, AsyncIterable):
        async for row in inputs:
            yield row
    else:
        for row in inputs:
            yield row


async def _collected(
    under_way: list[tuple[int, Handle]], ordered: bool, results: Results
) -> AsyncIterator[tuple[int, RowOutcome]]:
    """Yields the rows of one call: the oldest, or the first that is complete if the order does not matter."""
    handles = [handle for _, handle in under_way]
    place = await _first_ready(handles[:1] if ordered else handles) or 0
    first, handle = under_way[place]
    for row, outcome in enumerate(handle.outcomes(), start=first):
        if results == "values" and isinstance(outcome, MillstreamError):
            raise outcome
        yield row, outcome
    del under_way[place]
