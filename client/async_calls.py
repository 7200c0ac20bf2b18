"""Calls for an event loop: the same as calls.py, but the server is awaited and no thread of the caller blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from millstream.broker.contract.errors import BrokerUnavailable, DeadlineExceeded, InvalidRequest
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import BY_OP
from millstream.broker.contract.partial import Delta
from millstream.client.awaiting import await_acceptance, await_answer
from millstream.client.call_options import CallOptions
from millstream.client.call_request import StreamRequest
from millstream.client.calls import NO_HITS, Calls
from millstream.client.channel.loop_calls import arrival
from millstream.client.detached import Detached
from millstream.client.handle import Handle
from millstream.client.job_terms import Progress, waits_until
from millstream.client.known import Known, KnownRoute
from millstream.client.result import Embeddings
from millstream.client.rows import copy_arguments
from millstream.client.streaming import AsyncTextStream, TextCall

T = TypeVar("T")

FIRST_LOOK_S, LAST_LOOK_S = 0.005, 0.25
"""Seconds between the first two looks for the results of a detached call, and between the last ones of a long wait."""


class AsyncCalls:
    """All calls of one asyncio client. Safe to use from several event loops."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    async def start(
        self,
        service: str | None,
        inputs: Sequence[Json],
        opts: CallOptions,
        progress: Progress | None = None,
        *,
        in_thread: bool = False,
    ) -> Handle:
        """Does as Calls.start. `in_thread`: rows are checked, split and encoded in a thread, for calls with many.

        The caller does not change inputs and options then.
        """
        opts = opts.validate()
        began = time.monotonic()
        until = opts.until(began)
        services = self.calls.services
        name = service or services.known_only(BY_OP[opts.op].type)
        target = services.known_target(name) if name else None
        if target is None:
            if not in_thread:
                # The caller may change its inputs while this waits for the server.
                inputs, opts = copy_arguments(inputs, opts)
            target = await self.target(name or await self.only(opts.op, until), until)
        chosen = self.calls.choose(target, opts, progress)
        hits = NO_HITS
        if chosen.spec.runtime.enable_cache:
            if not in_thread:
                inputs, opts = copy_arguments(inputs, opts)
            hits = await arrival(partial(self.calls.read_cache_soon, chosen.spec, inputs, opts))
        begin = partial(self.calls.begin, chosen, inputs, opts, hits, began, progress)
        return await self._begin_in_thread(begin) if in_thread else begin()

    async def _begin_in_thread(self, begin: Callable[[], Handle]) -> Handle:
        future = self.calls.executor.submit(begin)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            # The thread cannot be interrupted: the call ends as soon as it has begun.
            future.add_done_callback(_cancel_begun)
            raise

    def open(self, request: StreamRequest) -> AsyncTextStream:
        """Returns the stream of a call that begins with the first piece that is awaited."""

        async def begin() -> TextCall:
            opts = request.opts.validate()
            began = time.monotonic()
            until = opts.until(began)
            (row,), opts = copy_arguments([request.row], opts)
            target = await self.target(request.service or await self.only(opts.op, until), until)
            return self.calls.begin_stream(self.calls.choose(target, opts), row, opts, began)

        async def read_partial(call: TextCall) -> Delta:
            return await self.in_thread(self.calls.read_partial, call)

        return AsyncTextStream(begin, read_partial)

    async def submit_detached(
        self, service: str, inputs: Sequence[Json], opts: CallOptions, idempotency_key: str | None
    ) -> Detached:
        """Does as Calls.submit_detached. The methods of Detached block."""
        opts = opts.validate()
        until = opts.until(time.monotonic())
        rows, opts = copy_arguments(inputs, opts)
        target = await self.target(service, until)
        if idempotency_key is None:
            spec = self.calls.choose_detached(target, opts, None)
        else:
            spec = await self.in_thread(self.calls.choose_detached, target, opts, idempotency_key)
        request = self.calls.check_detached(spec, rows, opts, until, idempotency_key)
        try:
            return await await_acceptance(request.begin(self.calls, request.per_job))
        except InvalidRequest:
            per_job = await self.in_thread(request.find_other_per_job, self.calls)
            if per_job is None:
                raise
            return await await_acceptance(request.begin(self.calls, per_job))

    async def wait_detached(self, detached: Detached, timeout: float | None) -> Embeddings | list[Json]:
        """Does as Detached.result, and outlasts a server that is away, for at most `timeout` seconds."""
        until = waits_until(timeout)
        pause = FIRST_LOOK_S
        while not await self._is_done(detached, until):
            if until is not None and time.monotonic() >= until:
                raise DeadlineExceeded(f"no result within {timeout} s of waiting", phase="total")
            await asyncio.sleep(pause)
            pause = min(LAST_LOOK_S, pause * 1.5)
        return await self.in_thread(detached.result)

    async def _is_done(self, detached: Detached, until: float | None) -> bool:
        try:
            return await self.in_thread(detached.done)
        except BrokerUnavailable:
            if until is not None and time.monotonic() >= until:
                raise
            return False

    async def only(self, op: str, until: float | None) -> str:
        """Does as Services.only, for the type of models that runs `op`."""
        services, model_type = self.calls.services, BY_OP[op].type
        if known := services.known_only(model_type):
            return known
        return await await_answer(services.ask_only(model_type), until)

    async def target(self, name: str, until: float | None) -> Known | KnownRoute:
        """Does as Services.read_target."""
        services = self.calls.services
        if target := services.known_target(name):
            return target
        return await await_answer(services.ask_target(name), until)

    async def in_thread(self, function: Callable[..., T], *args: object) -> T:
        """Runs `function` in a thread, of which there are few."""
        return await asyncio.get_running_loop().run_in_executor(self.calls.executor, partial(function, *args))


def _cancel_begun(future: Future[Handle]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().cancel_soon()
