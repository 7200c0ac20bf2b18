"""Requests of `embed`, `rerank`, `generate`, `chat`, `call`: rows and options to send, and the value to return. Pure.

The blocking and the async client send them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

from millstream.broker.contract.embedding import EmbedOptions
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import EMBED, RERANK
from millstream.broker.contract.rerank import RerankOptions
from millstream.broker.contract.scalars import plain
from millstream.client.call_options import CallOptions
from millstream.client.generate import Generated, read_chat, read_keywords, read_prompts
from millstream.client.rerank import Ranking, check_top_n, copy_documents
from millstream.client.result import Embeddings, generations, to_vectors

T = TypeVar("T")


class CallRequest(NamedTuple, Generic[T]):
    """Call to make. `convert` makes the value that the client returns from the call's result.

    `service` None means the only one that runs the operation of `opts`.
    """

    service: str | None
    inputs: Sequence[Json]
    opts: CallOptions
    convert: Callable[[Embeddings | list[Json]], T]


class StreamRequest(NamedTuple):
    """Streaming call to make, of one row. `service` None means the only one that runs the operation of `opts`."""

    service: str | None
    row: Json
    opts: CallOptions


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


def prepare_generate(prompt: object, keywords: Mapping[str, object]) -> CallRequest[Any]:
    """Returns the request of Client.generate. `keywords` are GenerateKeywords.

    Raises InvalidRequest if `prompt` is neither a prompt nor a list of them, or an option of the model is wrong.
    """
    rows, single = read_prompts(prompt)
    service, opts = read_keywords(keywords)
    return CallRequest(service, rows, opts, _take_text if single else generations)


def prepare_chat(messages: object, tools: object, keywords: Mapping[str, object]) -> CallRequest[Generated]:
    """Returns the request of Client.chat. Raises as prepare_generate does."""
    row = read_chat(messages, tools)
    service, opts = read_keywords(keywords)
    return CallRequest(service, [row], opts, _take_text)


def to_stream(request: CallRequest[T]) -> StreamRequest:
    """Returns the streaming form of a request of one row. Raises InvalidRequest if it has another number of rows."""
    if len(request.inputs) != 1 or request.convert is not _take_text:
        raise InvalidRequest("a stream has one prompt, not a list of them", hint="open a stream for each")
    return StreamRequest(request.service, request.inputs[0], request.opts)


def prepare_call(service: str, payload: object, opts: CallOptions) -> CallRequest[Any]:
    """Returns the request of Client.call."""
    return CallRequest(service, cast(Sequence[Json], [payload]), opts, _take_first)


def _take_text(result: Embeddings | list[Json]) -> Generated:
    return generations(result)[0]


def _take_first(result: Embeddings | list[Json]) -> Any:
    return result[0]
