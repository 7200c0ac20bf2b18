"""Clients that call services through the queue. Needs no torch.

`client.embed(texts)`, `client.chat(messages)` and the other functions use one `Client()` for the whole process, made at
the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, overload

from millstream.broker.contract.errors import MillstreamError, PartialFailure
from millstream.client.aio import AsyncClient
from millstream.client.async_handle import AsyncHandle
from millstream.client.bulk.progress import BulkProgress
from millstream.client.client import Client
from millstream.client.detached import Detached
from millstream.client.generate import Generated, PromptInput
from millstream.client.generate_stream import AsyncGenerateStream, GenerateStream, TextDelta
from millstream.client.handle import Handle
from millstream.client.rerank import Ranked, Ranking
from millstream.client.result import Embeddings, Values
from millstream.client.stats import ServiceStats
from millstream.client.streaming import AsyncTextStream, TextStream

__all__ = [
    "AsyncClient",
    "AsyncGenerateStream",
    "AsyncHandle",
    "AsyncTextStream",
    "BulkProgress",
    "Client",
    "Detached",
    "Embeddings",
    "GenerateStream",
    "Generated",
    "Handle",
    "MillstreamError",
    "PartialFailure",
    "Ranked",
    "Ranking",
    "ServiceStats",
    "TextDelta",
    "TextStream",
    "Values",
    "call",
    "chat",
    "chat_stream",
    "default",
    "embed",
    "generate",
    "generate_stream",
    "rerank",
    "stream",
]


@functools.cache
def default() -> Client:
    """Returns the one Client of this process, made at the first call. It finds its server as `Client()` does."""
    return Client()


def embed(texts: str | Sequence[str], **options: Any) -> Embeddings:
    """Calls `default().embed(texts, ...)`: see Client.embed."""
    return default().embed(texts, **options)


def call(service: str, payload: object, **options: Any) -> Any:
    """Calls `default().call(service, payload, ...)`: see Client.call."""
    return default().call(service, payload, **options)


def rerank(query: str, documents: Sequence[str], **options: Any) -> Ranking:
    """Calls `default().rerank(query, documents, ...)`: see Client.rerank."""
    return default().rerank(query, documents, **options)


@overload
def generate(prompt: PromptInput, **options: Any) -> Generated: ...


@overload
def generate(prompt: list[str] | list[list[int]], **options: Any) -> list[Generated]: ...


def generate(prompt: PromptInput | list[str] | list[list[int]], **options: Any) -> Generated | list[Generated]:
    """Calls `default().generate(prompt, ...)`: see Client.generate."""
    return default().generate(prompt, **options)


def generate_stream(prompt: PromptInput, **options: Any) -> GenerateStream:
    """Calls `default().generate_stream(prompt, ...)`: see Client.generate_stream."""
    return default().generate_stream(prompt, **options)


def chat(messages: Sequence[Mapping[str, Any]], **options: Any) -> Generated:
    """Calls `default().chat(messages, ...)`: see Client.chat."""
    return default().chat(messages, **options)


def chat_stream(messages: Sequence[Mapping[str, Any]], **options: Any) -> GenerateStream:
    """Calls `default().chat_stream(messages, ...)`: see Client.chat_stream."""
    return default().chat_stream(messages, **options)


def stream(service: str, payload: object, **options: Any) -> TextStream:
    """Calls `default().stream(service, payload, ...)`: see Client.stream."""
    return default().stream(service, payload, **options)
