"""Client for asyncio: the same calls over the same channel, awaited. Cancelling an awaiting task cancels its jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast, overload

from millstream.broker.config.spec import PriorityName
from millstream.broker.contract.embedding import EmbedOptions, Encoding, InputType, Truncate
from millstream.broker.contract.job import Json
from millstream.broker.contract.prompt import Message
from millstream.broker.contract.rerank import RerankOptions, Scores
from millstream.client.async_calls import AsyncCalls
from millstream.client.async_handle import AsyncHandle
from millstream.client.call_options import CallOptions
from millstream.client.call_request import (
    CallRequest,
    StreamRequest,
    prepare_call,
    prepare_chat,
    prepare_embed,
    prepare_generate,
    prepare_rerank,
    to_stream,
)
from millstream.client.calls import Calls
from millstream.client.detached import Detached
from millstream.client.generate import Generated, GenerateKeywords, PromptInput
from millstream.client.generate_stream import AsyncGenerateStream
from millstream.client.job_terms import Progress
from millstream.client.local import START_S, Local
from millstream.client.map_window import MapWindow, Results
from millstream.client.mapping import map_rows_async
from millstream.client.rerank import Ranking
from millstream.client.result import Embeddings
from millstream.client.stats import ServiceStats
from millstream.client.streaming import AsyncTextStream

T = TypeVar("T")


class AsyncClient:
    """Client for asyncio, with the same arguments and errors as Client. Thousands of calls may be awaited at once.

    Safe to use from several event loops. Its own threads talk to the server, so no call blocks the loop.
    """

    _local: Local | None = None

    def __init__(self, url: str | None = None, *, prefix: str | None = None) -> None:
        self._calls = Calls(url, prefix)
        self._async_calls = AsyncCalls(self._calls)

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
        version: str = "",
        sticky_key: str = "",
        input_type: InputType | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        encoding: Encoding = "float32",
    ) -> Embeddings:
        """Does as Client.embed."""
        opts = CallOptions(priority, timeout, wait, tenant, version=version, sticky_key=sticky_key)
        model = EmbedOptions(truncate, input_type, prompt, dimensions, normalize, encoding)
        return await self._run(prepare_embed(service, texts, opts, model))

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
        version: str = "",
        sticky_key: str = "",
        scores: Scores | None = None,
        instruction: str | None = None,
    ) -> Ranking:
        """Does as Client.rerank."""
        opts = CallOptions(priority, timeout, wait, tenant, version=version, sticky_key=sticky_key)
        model = RerankOptions(query, scores, instruction, truncate)
        return await self._run(prepare_rerank(service, documents, opts, model, top_n, return_documents))

    async def submit(
        self,
        service: str,
        inputs: Sequence[Json],
        *,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        tenant: str = "",
        version: str = "",
        sticky_key: str = "",
        **options: Json,
    ) -> AsyncHandle:
        """Does as Client.submit."""
        return AsyncHandle(
            await self._async_calls.start(
                service,
                inputs,
                CallOptions(priority, timeout, wait, tenant, options, version=version, sticky_key=sticky_key),
            )
        )

    async def call(
        self,
        service: str,
        payload: object,
        *,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        tenant: str = "",
        version: str = "",
        sticky_key: str = "",
    ) -> Any:
        """Does as Client.call."""
        return await self._run(
            prepare_call(
                service, payload, CallOptions(priority, timeout, wait, tenant, version=version, sticky_key=sticky_key)
            )
        )

    def map(
        self,
        service: str,
        inputs: Iterable[Json] | AsyncIterable[Json],
        *,
        window: int = 2_048,
        ordered: bool = True,
        priority: PriorityName = "batch",
        tenant: str = "",
        version: str = "",
        sticky_key: str = "",
        results: Results = "values",
        **options: Json,
    ) -> AsyncGenerator[Any, None]:
        """Does as Client.map, and takes async iterables too.

        To cancel the rest at once, call `aclose` of the generator, or use contextlib.aclosing.
        """
        opts = CallOptions(priority, None, True, tenant, options, version=version, sticky_key=sticky_key)
        progress = Progress()
        return map_rows_async(
            lambda rows: self._async_calls.start(service, rows, opts, progress),
            inputs,
            MapWindow(window, ordered, results),
        )

    def stream(
        self,
        service: str,
        payload: object,
        *,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        tenant: str = "",
        version: str = "",
        sticky_key: str = "",
        **options: Json,
    ) -> AsyncTextStream:
        """Does as Client.stream: `async for piece in client.stream(...)`, or `async with client.stream(...) as stream`.

        The call begins with the first piece that is awaited, or with `async with`, and then raises its errors.
        """
        opts = CallOptions(priority, timeout, wait, tenant, options, version=version, sticky_key=sticky_key)
        return self._async_calls.open(StreamRequest(service, cast(Json, payload), opts))

    @overload
    async def generate(self, prompt: PromptInput, **options: Unpack[GenerateKeywords]) -> Generated: ...

    @overload
    async def generate(
        self, prompt: list[str] | list[list[int]], **options: Unpack[GenerateKeywords]
    ) -> list[Generated]: ...

    async def generate(
        self, prompt: PromptInput | list[str] | list[list[int]], **options: Unpack[GenerateKeywords]
    ) -> Generated | list[Generated]:
        """Does as Client.generate."""
        return cast("Generated | list[Generated]", await self._run(prepare_generate(prompt, options)))

    def generate_stream(self, prompt: PromptInput, **options: Unpack[GenerateKeywords]) -> AsyncGenerateStream:
        """Does as Client.generate_stream: `async for delta in client.generate_stream(...)`.

        The call begins with the first piece that is awaited, or with `async with`, and then raises its errors.
        """
        return AsyncGenerateStream(self._async_calls.open(to_stream(prepare_generate(prompt, options))))

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> Generated:
        """Does as Client.chat."""
        return await self._run(prepare_chat(messages, tools, options))

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> AsyncGenerateStream:
        """Does as Client.chat_stream; begins as `generate_stream` does."""
        return AsyncGenerateStream(self._async_calls.open(to_stream(prepare_chat(messages, tools, options))))

    async def submit_detached(
        self,
        service: str,
        inputs: Sequence[Json],
        *,
        priority: PriorityName = "batch",
        timeout: float | None = None,
        tenant: str = "",
        version: str = "",
        sticky_key: str = "",
        idempotency_key: str | None = None,
        webhook: str | None = None,
        **options: Json,
    ) -> Detached:
        """Does as Client.submit_detached. The methods of Detached block: call them with asyncio.to_thread."""
        opts = CallOptions(
            priority, timeout, True, tenant, options, webhook=webhook, version=version, sticky_key=sticky_key
        )
        return await self._async_calls.submit_detached(service, inputs, opts, idempotency_key)

    def job(self, job_id: str) -> Detached:
        """Does as Client.job. The methods of Detached block: call them with asyncio.to_thread."""
        return Detached.find(self._calls, job_id)

    async def stats(self, service: str) -> ServiceStats:
        """Does as Client.stats."""
        return await self._async_calls.in_thread(self._calls.stats, service)

    async def close(self) -> None:
        """Does as Client.close."""
        await self._async_calls.in_thread(self._calls.close)
        if self._local:
            await self._async_calls.in_thread(self._local.stop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, request: CallRequest[T]) -> T:
        handle = await self._async_calls.start(request.service, request.inputs, request.opts)
        return request.convert(await AsyncHandle(handle).result())
