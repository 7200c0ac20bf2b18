"""The blocking client: thread-safe, one channel a process behind it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from millstream.broker.contract.embedding import EmbedOptions, Encoding, InputType, Truncate
from millstream.broker.contract.job import Json
from millstream.broker.contract.scalars import plain
from millstream.client.calls import CallOptions, Calls, PriorityName, vectors_of
from millstream.client.detached import Detached
from millstream.client.handle import Handle
from millstream.client.job_terms import Progress
from millstream.client.local import START_S, Local
from millstream.client.mapping import Results, map_rows
from millstream.client.rerank import Ranking, Scores, copied, question
from millstream.client.result import Embeddings


class Client:
    """Calls services through the queue.

    Without `url` it takes MILLSTREAM_REDIS_URL, then ./config.yaml, then the server of a local `millstream up`.
    Raises ConfigError or BrokerUnavailable if none of them says where the queue is; connects on the first call.
    """

    _local: Local | None = None

    def __init__(self, url: str | None = None, *, prefix: str | None = None) -> None:
        self._calls = Calls(url, prefix)

    @classmethod
    def local(
        cls,
        config: Path | str = "config.yaml",
        *,
        data_dir: Path | str | None = None,
        replace: bool = False,
        timeout: float | None = START_S,
    ) -> Self:
        """A client with a server and workers of its own: `millstream up CONFIG` in a child process.

        Returns when the workers of every service are ready, for which they have `timeout` seconds. `close`, the end of
        a `with` block and the end of this process, even by kill -9, end them all within seconds; what they held stays
        in the queue. `data_dir` is where the server keeps the queue, by default where `millstream up` keeps it; give it
        a temporary folder for a queue that leaves nothing behind. If a server runs on it already, or a URL is
        configured, that one is used and left running, with workers of this client's own. `replace` changes services
        that are registered with other settings.

        Raises what `millstream up` would say: ConfigError, ModelUnavailable, BrokerUnavailable; NoWorkers after
        `timeout`, with the last messages.
        """
        stack = Local.start(config, data_dir=data_dir, replace=replace, timeout=timeout)
        client = cls(stack.url, prefix=stack.prefix)
        client._local = stack
        return client

    def embed(
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
        """Vectors of `texts`, float32 [len(texts), dim] in the order given; [dim] for a single str.

        Without more they are what the model's `encode` gives for each text. `input_type` "query" or "document" gives
        what its `encode_query` or `encode_document` does, with the model's own prompts; `prompt` stands before each
        text instead of those. `dimensions` keeps the first so many of each vector, made a unit vector again if the
        model gives unit vectors; `normalize` True makes one of any, False leaves the cut one as it is. `encoding`
        "float16" gives float16, "binary" uint8 [len(texts), ceil(dim / 8)]: a bit for each number, set if it is
        above zero, as ubinary of sentence-transformers. Models with sparse vectors answer `submit` and `map`.

        `service` may be left out if one embedding service is registered. `timeout` is seconds for the whole call;
        without it the call ends when nothing of it was answered for the service's total_timeout. `wait=False` raises
        QueueFull at once instead of waiting for room. `truncate` "start" or "end" cuts texts that are too long, and
        reports them in `.truncated`.

        Raises DeadlineExceeded, NoWorkers, QueueFull (with retry_after, seconds), InvalidRequest, InputTooLong,
        UnknownService, BrokerUnavailable; PartialFailure (errors by index) if only some texts failed.
        """
        texts = cast(Sequence[str], plain(texts))
        single = isinstance(texts, str)
        options = EmbedOptions(truncate, input_type, prompt, dimensions, normalize, encoding).json()
        rows = cast(Sequence[Json], [texts] if single else texts)
        handle = self._calls.start(service, rows, CallOptions(priority, timeout, wait, tenant, options, "embed"))
        return vectors_of(handle.finish(), single)

    def rerank(
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
        """`documents` by how well they answer `query`, the best first: index, score and document each, at most `top_n`.

        `document` is None unless `return_documents`. `scores` are what the model gives by itself, "raw" what it gives
        before a sigmoid, "sigmoid" between 0 and 1. `instruction` tells a generative reranker what to look for.
        `truncate` cuts documents that are too long with their query, never the query. `service` may be left out if
        one reranker service is registered; the rest is as in `embed`, errors too: PartialFailure has the other
        documents' scores as its results, by index.
        """
        options = question(query, top_n, scores, instruction, truncate)
        texts = copied(documents)
        handle = self._calls.start(
            service, cast(Sequence[Json], texts), CallOptions(priority, timeout, wait, tenant, options, op="rerank")
        )
        return Ranking.of(handle.finish(), top_n, texts if return_documents else None)

    def submit(
        self,
        service: str,
        inputs: Sequence[Json],
        *,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        tenant: str = "",
        **options: Json,
    ) -> Handle:
        """Send `inputs`, one a row, and return at once; the handle's `result` waits. Raises as `embed` does.

        `options` go to the model: of an embedding service those of `embed`, from `truncate` on; of a reranker `query`,
        which it must have, `truncate`, `scores` and `instruction`. A sparse embedding model answers
        {"indices": [...], "values": [...]} for each text, by rising index. The rows of a custom service are any JSON.
        """
        return self._calls.start(service, inputs, CallOptions(priority, timeout, wait, tenant, options))

    def call(
        self,
        service: str,
        payload: object,
        *,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        tenant: str = "",
    ) -> Any:
        """The result of one `payload`: what the service's function gave for it, JSON or a vector, float32 [dim].

        A custom service takes any JSON; what JSON cannot carry is InvalidRequest. Raises as `embed` does, and
        ModelFailed if the function failed on this payload.
        """
        rows = cast(Sequence[Json], [payload])
        return self._calls.start(service, rows, CallOptions(priority, timeout, wait, tenant)).finish()[0]

    def map(
        self,
        service: str,
        inputs: Iterable[Json],
        *,
        window: int = 2_048,
        ordered: bool = True,
        priority: PriorityName = "batch",
        tenant: str = "",
        results: Results = "values",
        **options: Json,
    ) -> Generator[Any, None, None]:
        """The result of each input, for an iterable of any length, with at most about `window` rows under way.

        In the inputs' order, or with `ordered=False` as (index, result) pairs as they come. A row that fails raises its
        error; with `results="outcomes"` the error is yielded in its place. Ending the iteration, by an error or by the
        generator's `close`, cancels the rest.
        """
        opts = CallOptions(priority, None, True, tenant, options)
        progress = Progress()
        return map_rows(lambda rows: self._calls.start(service, rows, opts, progress), inputs, window, ordered, results)

    def submit_detached(
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
        """Send `inputs` and leave: the results wait in Redis for any process that asks by the id.

        They live until `result_ttl` after the last one. Blocks until the server has accepted all of it. A second
        submission under the same `idempotency_key` is the first one; with other inputs or options it is InvalidRequest.
        Raises QueueFull, InvalidRequest, UnknownService, BrokerUnavailable.
        """
        opts = CallOptions(priority, timeout, True, tenant, options)
        return self._calls.submit_detached(service, inputs, opts, idempotency_key)

    def job(self, job_id: str) -> Detached:
        """A detached call by its id, from any process. Raises InvalidRequest if it is no such id."""
        return Detached.find(self._calls, job_id)

    @property
    def stray_replies(self) -> int:
        """Replies that came for no waiting call: after its timeout, or read twice around a cut connection."""
        return self._calls.channel.stray_replies

    def close(self) -> None:
        """End the client's threads and connections. Calls under way in other threads get BrokerUnavailable."""
        self._calls.close()
        if self._local:
            self._local.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
