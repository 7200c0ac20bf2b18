"""Requests of `embed`, `rerank` and `call`: the rows and options to send, and the value to return. Pure.

The blocking and the async client send them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

from millstream.broker.contract.embedding import EmbedOptions
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import EMBED, RERANK
from millstream.broker.contract.rerank import RerankOptions
from millstream.broker.contract.scalars import plain
from millstream.client.call_options import CallOptions
from millstream.client.rerank import Ranking, check_top_n, copy_documents
from millstream.client.result import Embeddings, to_vectors

T = TypeVar("T")


class CallRequest(NamedTuple, Generic[T]):
    """Call to make. `convert` makes the value that the client returns from the call's result.

    `service` None means the only one that runs the operation of `opts`.
    """

    service: str | None
    inputs: Sequence[Json]
    opts: CallOptions
    convert: Callable[[Embeddings | list[Json]], T]


def prepare_embed(
    service: str | None, texts: str | Sequence[str], opts: CallOptions, model: EmbedOptions
) -> CallRequest[Embeddings]:
    """Returns the request of Client.embed. `model` are the options that go to the model."""
    texts = cast(Sequence[str], plain(texts))
    single = isinstance(texts, str)
    rows = cast(Sequence[Json], [texts] if single else texts)
    opts = opts._replace(options=model.json(), op=EMBED.op)
    return CallRequest(service, rows, opts, partial(to_vectors, single=single))


def prepare_rerank(
    service: str | None,
    documents: Sequence[str],
    opts: CallOptions,
    model: RerankOptions,
    top_n: int | None,
    return_documents: bool,
) -> CallRequest[Ranking]:
    """Returns the request of Client.rerank. `model` are the options that go to the model.

    Raises InvalidRequest if `top_n` is not an int above 0.
    """
    check_top_n(top_n)
    texts = copy_documents(documents)
    opts = opts._replace(options=model.json(), op=RERANK.op)
    convert = partial(Ranking.of, top_n=top_n, documents=texts if return_documents else None)
    return CallRequest(service, cast(Sequence[Json], texts), opts, convert)


def prepare_call(service: str, payload: object, opts: CallOptions) -> CallRequest[Any]:
    """Returns the request of Client.call."""
    return CallRequest(service, cast(Sequence[Json], [payload]), opts, _take_first)


def _take_first(result: Embeddings | list[Json]) -> Any:
    return result[0]
