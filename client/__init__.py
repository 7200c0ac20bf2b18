"""Calling services through the queue. Needs no torch."""

from millstream.broker.errors import MillstreamError, PartialFailure
from millstream.client.client import Client
from millstream.client.handle import Handle
from millstream.client.result import Embeddings

__all__ = ["Client", "Embeddings", "Handle", "MillstreamError", "PartialFailure"]
