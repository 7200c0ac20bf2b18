"""Clients that call services through the queue. Needs no torch.

`client.embed(texts)` and `client.rerank(query, documents)` use one `Client()` for the whole process, made at the first
call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from millstream.broker.contract.errors import MillstreamError, PartialFailure
from millstream.client.aio import AsyncClient
from millstream.client.async_handle import AsyncHandle
from millstream.client.client import Client
from millstream.client.detached import Detached
from millstream.client.handle import Handle
from millstream.client.rerank import Ranked, Ranking
from millstream.client.result import Embeddings, Values
from millstream.client.streaming import AsyncTextStream, TextStream

__all__ = [
    "AsyncClient",
    "AsyncHandle",
    "AsyncTextStream",
    "Client",
    "Detached",
    "Embeddings",
    "Handle",
    "MillstreamError",
    "PartialFailure",
    "Ranked",
    "Ranking",
    "TextStream",
    "Values",
    "call",
    "default",
    "embed",
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


def stream(service: str, payload: object, **options: Any) -> TextStream:
    """Calls `default().stream(service, payload, ...)`: see Client.stream."""
    return default().stream(service, payload, **options)
