"""Types of models, and everything that differs between them: a record a type.

To add a type is to add a record here and the module that loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ModelType = Literal["embedding", "reranker", "llm", "custom", "echo", "echo-stream"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One type of model: how it is called, what it takes, what it answers, who loads it."""

    type: ModelType
    """Name in config.yaml."""

    op: str
    """Name on the wire, at most 64 of A-Z a-z 0-9 _ . -"""

    loader: str = ""
    """Function that loads a model, as "module:name"; empty if this version has no worker for the type."""

    streams: bool = False
    """Whether a job has one row whose text grows and is shown while it runs."""


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        each.type: each
        for each in (
            Operation("embedding", "embed", "millstream.worker.models.embedding.embedding:load"),
            Operation("reranker", "rerank", "millstream.worker.models.reranking.reranker:load"),
            Operation("llm", "generate", streams=True),
            Operation("custom", "call", "millstream.worker.models.custom:load"),
            Operation("echo", "echo", "millstream.worker.models.echo:load"),
            Operation("echo-stream", "stream", "millstream.worker.models.echo_stream:load", streams=True),
        )
    }
)
"""By type."""

STREAMING_OPS = frozenset(each.op for each in OPERATIONS.values() if each.streams)
"""Names on the wire of operations that stream."""
