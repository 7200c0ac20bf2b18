"""Blocking client: thread-safe, with one channel to the server."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast, overload

from millstream.broker.config.spec import PriorityName
from millstream.broker.contract.embedding import EmbedOptions, Encoding, InputType, Truncate
from millstream.broker.contract.job import Json
from millstream.broker.contract.prompt import Message
from millstream.broker.contract.rerank import RerankOptions, Scores
from millstream.client.bulk.opening import InputFormat
from millstream.client.bulk.plan import WINDOW, BulkPlan
from millstream.client.bulk.progress import BulkProgress
from millstream.client.bulk.retry import RetryPlan, retry_failed
from millstream.client.bulk.run import run_bulk
from millstream.client.bulk.sinks import OutputFormat
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
from millstream.client.generate_stream import GenerateStream
from millstream.client.handle import Handle
from millstream.client.job_terms import Progress
from millstream.client.local import START_S, Local
from millstream.client.map_window import MapWindow, Results
from millstream.client.mapping import map_rows
from millstream.client.rerank import Ranking
from millstream.client.result import Embeddings
from millstream.client.stats import ServiceStats
from millstream.client.streaming import TextStream

T = TypeVar("T")


class Client:
    """Calls services through the queue.

    Without `url` it uses MILLSTREAM_REDIS_URL, then ./config.yaml, then the server of a local `millstream up`. It
    connects on the first call.

    Raises ConfigError or BrokerUnavailable if none of them names a server.
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
        """Returns a client with its own server and workers: `millstream up CONFIG` in a child process.

        Returns when the workers of every service are ready, after at most `timeout` seconds. `close`, the end of a
        `with` block and the end of this process, even by kill -9, end the server and the workers within seconds; their
        unfinished jobs stay in the queue. `data_dir` is the folder of the server's data, by default that of
        `millstream up`; use a temporary folder if no data should remain. If a server runs on it already, or a URL is
        configured, that server is used and not stopped, with this client's own workers. `replace` changes services that
        are registered with other settings.

        Raises the errors of `millstream up`: ConfigError, ModelUnavailable, BrokerUnavailable; NoWorkers after
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
        version: str = "",
        sticky_key: str = "",
        input_type: InputType | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        encoding: Encoding = "float32",
    ) -> Embeddings:
        """Returns the vectors of `texts`, float32 [len(texts), dim], in the order given; [dim] for a single str.

        By default they are those of the model's `encode`. `input_type` "query" or "document" gives those of its
        `encode_query` or `encode_document`, with the model's own prompts; `prompt` replaces these prompts.
        `dimensions` is the number of leading dimensions to keep; the shorter vectors are scaled to unit length again
        if the model's vectors have it. `normalize` True scales all vectors to unit length; False does not scale the
        shorter ones. `encoding` "float16" gives float16; "binary" gives uint8 [len(texts), ceil(dim / 8)]: one bit for
        each number, set if it is above zero, as ubinary of sentence-transformers. For models with sparse vectors, use
        `submit` or `map`.

        `service` may be omitted if exactly one embedding service is registered. `timeout` is in seconds, for the whole
        call; without it the call ends if none of its jobs was answered for the service's total_timeout. `wait=False`
        raises QueueFull at once instead of waiting for room. `truncate` "start" or "end" cuts texts that are too long;
        `.truncated` of the result lists them.

        If `service` is a route, `version` names the version that must answer. Otherwise the route chooses one, for each
        tenant or each `sticky_key` as it says, and `.version` of the result names it.

        Raises DeadlineExceeded, NoWorkers, QueueFull (with retry_after, seconds), InvalidRequest, InputTooLong,
        UnknownService, BrokerUnavailable; PartialFailure (errors by index) if only some texts failed.
        """
        opts = CallOptions(priority, timeout, wait, tenant, version=version, sticky_key=sticky_key)
        model = EmbedOptions(truncate, input_type, prompt, dimensions, normalize, encoding)
        return self._run(prepare_embed(service, texts, opts, model))

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
        version: str = "",
        sticky_key: str = "",
        scores: Scores | None = None,
        instruction: str | None = None,
    ) -> Ranking:
        """Ranks `documents` by how well they answer `query`. Returns at most `top_n` of them, the best first.

        Each has an index, a score and, if `return_documents` is True, its document. By default `scores` are the
        model's own; "raw" gives them before a sigmoid, "sigmoid" between 0 and 1. `instruction` tells a language
        model how to judge. `truncate` cuts documents that are too long together with the query, never the query.
        `service` may be omitted if exactly one reranker service is registered. The other arguments are those of
        `embed`.

        Raises as `embed` does; the results of PartialFailure are the scores of the other documents, by index.
        """
        opts = CallOptions(priority, timeout, wait, tenant, version=version, sticky_key=sticky_key)
        model = RerankOptions(query, scores, instruction, truncate)
        return self._run(prepare_rerank(service, documents, opts, model, top_n, return_documents))

    def submit(
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
    ) -> Handle:
        """Sends `inputs`, one row each, and returns at once; the handle's `result` waits. Raises as `embed` does.

        `options` go to the model. An embedding service takes `truncate`, `input_type`, `prompt`, `dimensions`,
        `normalize` and `encoding` of `embed`; a reranker takes `query`, which is required, `truncate`, `scores` and
        `instruction`. A sparse embedding model answers {"indices": [...], "values": [...]} for each text, by rising
        index. A row of a custom service is any JSON value.
        """
        return self._calls.start(
            service,
            inputs,
            CallOptions(priority, timeout, wait, tenant, options, version=version, sticky_key=sticky_key),
        )

    def call(
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
        """Returns what the service's function returned for `payload`: a JSON value or a vector, float32 [dim].

        A custom service takes any JSON value. An llm service takes a prompt and returns Generated. Raises
        InvalidRequest if `payload` is not JSON, ModelFailed if the function failed on it, and otherwise as `embed`
        does.
        """
        return self._run(
            prepare_call(
                service, payload, CallOptions(priority, timeout, wait, tenant, version=version, sticky_key=sticky_key)
            )
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
    ) -> TextStream:
        """Returns an iterator over the text that the service generates for `payload`, any JSON value, while it grows.

        Closing it, or leaving its `with` block, cancels the job. `options` go to the model. `timeout` is in seconds,
        for the whole call; without it the call ends if no piece came for the service's total_timeout.

        Raises InvalidRequest if the service does not stream, UnknownService, BrokerUnavailable. The iterator raises the
        other errors of `embed`, and StreamDiverged.
        """
        opts = CallOptions(priority, timeout, wait, tenant, options, version=version, sticky_key=sticky_key)
        return self._calls.start_stream(StreamRequest(service, cast(Json, payload), opts))

    @overload
    def generate(self, prompt: PromptInput, **options: Unpack[GenerateKeywords]) -> Generated: ...

    @overload
    def generate(self, prompt: list[str] | list[list[int]], **options: Unpack[GenerateKeywords]) -> list[Generated]: ...

    def generate(
        self, prompt: PromptInput | list[str] | list[list[int]], **options: Unpack[GenerateKeywords]
    ) -> Generated | list[Generated]:
        """Returns the text that a language model generates behind `prompt`, a string or a list of token ids.

        A list of prompts gives a list of results in the same order; each prompt is a job of its own. The model reads
        the prompt as it is, without a chat template: see `chat`.

        `options` are `service`, `priority`, `timeout`, `wait`, `tenant`, `version` and `sticky_key`, as in `embed`, and
        GenerateOptions: max_tokens, temperature, top_p, top_k, min_p, seed, stop, stop_token_ids, presence_penalty,
        frequency_penalty,
        repetition_penalty, logit_bias, logprobs, response_format, ignore_eos. Those that are left out have the model's
        defaults. `service` may be omitted if exactly one llm service is registered. Without `timeout` the call ends if
        no text came for the service's total_timeout.

        Raises as `embed` does. InputTooLong: the prompt is longer than the model's context. PartialFailure: only some
        prompts of a list failed; `results` has the others.
        """
        return cast("Generated | list[Generated]", self._run(prepare_generate(prompt, options)))

    def generate_stream(self, prompt: PromptInput, **options: Unpack[GenerateKeywords]) -> GenerateStream:
        """Returns an iterator over the pieces of the text that `generate` would return, while it grows.

        Each piece has a `text`. The last one has an empty text, `finish_reason` and `usage`; `generated` of the stream
        is then the whole result. Closing the stream, or leaving its `with` block, cancels the job.

        Raises InvalidRequest, UnknownService, BrokerUnavailable. The iterator raises the other errors of `generate`,
        and StreamDiverged.
        """
        return GenerateStream(self._calls.start_stream(to_stream(prepare_generate(prompt, options))))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> Generated:
        """Returns the answer to a conversation, through the model's chat template. `options` as in `generate`.

        A message is {"role": "user", "content": "..."}. Roles are system, developer, user, assistant and tool; the
        template may refuse some. `tools` are the functions that the model may call, as JSON Schemas: {"type":
        "function", "function": {...}}. Calls of them are `tool_calls` of the result.
        """
        return self._run(prepare_chat(messages, tools, options))

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> GenerateStream:
        """Does as `generate_stream`, for the arguments of `chat`."""
        return GenerateStream(self._calls.start_stream(to_stream(prepare_chat(messages, tools, options))))

    def map(
        self,
        service: str,
        inputs: Iterable[Json],
        *,
        window: int = 2_048,
        ordered: bool = True,
        priority: PriorityName = "batch",
        tenant: str = "",
        version: str = "",
        sticky_key: str = "",
        results: Results = "values",
        **options: Json,
    ) -> Generator[Any, None, None]:
        """Yields the result of each input, for an iterable of any length, with at most about `window` rows in flight.

        Results come in the order of the inputs, or with `ordered=False` as (index, result) pairs as soon as they are
        there. A row that fails raises its error; with `results="outcomes"` the error is yielded instead. If the
        iteration ends early, by an error or by the generator's `close`, the rest is cancelled. If `service` is a route,
        all rows go to one version, and there is no fallback.
        """
        opts = CallOptions(priority, None, True, tenant, options, version=version, sticky_key=sticky_key)
        progress = Progress()
        return map_rows(
            lambda rows: self._calls.start(service, rows, opts, progress), inputs, MapWindow(window, ordered, results)
        )

    def submit_detached(
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
        """Submits `inputs` as a detached call. Its results stay in Redis for any process that has its id.

        The results expire `result_ttl` after the last one. Blocks until the server has accepted all jobs. A second
        submission with the same `idempotency_key` returns the first call. When all jobs are answered, the outcome is
        sent to the URL `webhook`, at least once: config.yaml must allow it, see docs/webhooks.md.

        Raises QueueFull, UnknownService, BrokerUnavailable, and InvalidRequest, also if the key was used with other
        inputs, options or webhook, and if the webhook is not allowed.
        """
        opts = CallOptions(
            priority, timeout, True, tenant, options, webhook=webhook, version=version, sticky_key=sticky_key
        )
        return self._calls.submit_detached(service, inputs, opts, idempotency_key)

    def job(self, job_id: str) -> Detached:
        """Returns the detached call with this id, in any process. Raises InvalidRequest if it is not such an id."""
        return Detached.find(self._calls, job_id)

    def bulk(
        self,
        service: str,
        input: Path | str,
        output: Path | str,
        *,
        input_format: InputFormat = "auto",
        format: OutputFormat = "jsonl",
        column: str | None = None,
        id_column: str | None = None,
        shard_rows: int | None = None,
        window: int = WINDOW,
        part: str = "1/1",
        priority: PriorityName = "batch",
        tenant: str = "",
        version: str = "",
        progress: Callable[[BulkProgress], object] = lambda _: None,
        **options: Json,
    ) -> BulkProgress:
        """Sends each row of a file through `service`, and writes the results to the folder `output`.

        The same call goes on if an earlier one ended before its end: shards of `shard_rows` rows that are finished are
        not computed again, and rows that are still in the queue are adopted. Memory is bounded by `window`, the number
        of rows in flight. Blocks until the end, and returns the last progress; `progress` gets it every 2 s or sooner.

        `version` names the version of a route that gets all rows.

        `input` is a file of JSON lines, CSV, Parquet or lines of text, by its suffix or `input_format`; a folder of
        text files; or "-", standard input. `column` is the field that is sent, by default the whole line; `id_column`
        the one that is written beside each result. `input_format="openai"` reads a batch file of OpenAI's API, in
        which each request has its own options. `format` is that of the files `part-*` in `output`: jsonl, csv, npy for
        vectors, parquet, or openai for OpenAI's batch lines. They have the order of the input. Parquet needs the extra
        `bulk`. Rows that failed are in `errors.jsonl`, with the reason: see `retry_failed`. `part` "2/8" does every
        eighth shard, from the second one on: eight such runs, each with its own folder, do the input.

        Raises InvalidRequest if the input, an option or the model was changed since the run began, and says what;
        UnknownService; BrokerUnavailable if the server is away for 5 minutes; MillstreamError if the disk is full.
        """
        opts = CallOptions(priority, None, True, tenant, options, version=version)
        plan = BulkPlan(
            service, str(input), Path(output), opts, input_format, format, column, id_column, shard_rows, window, part
        )
        return run_bulk(self._calls, plan, progress)

    def retry_failed(
        self,
        output: Path | str,
        *,
        input: Path | str | None = None,
        window: int = WINDOW,
        priority: PriorityName = "batch",
        tenant: str = "",
        progress: Callable[[BulkProgress], object] = lambda _: None,
    ) -> BulkProgress:
        """Runs the failed rows of the bulk run in the folder `output` again, with the service and options of the run.

        Results of rows that succeed now are merged into the files of their shards, and leave `errors.jsonl`; the others
        stay there with their new reason. A file changes whole or not at all. The same call goes on if an earlier one
        ended before its end. `input` is the path of the run's input, if it was moved. The other arguments are those of
        `bulk`. Blocks until the end; `rows` of the progress are those that were tried again, `failed` of them in vain.

        Raises as `bulk` does, and InvalidRequest if `output` is not the folder of a run.
        """
        path = None if input is None else str(input)
        plan = RetryPlan(Path(output), path, priority, tenant, window)
        return retry_failed(self._calls, plan, progress)

    def stats(self, service: str) -> ServiceStats:
        """Returns the totals of `service` over all of its clients and workers: batches, rows, answers, refusals.

        Raises UnknownService, BrokerUnavailable.
        """
        return self._calls.stats(service)

    @property
    def stray_replies(self) -> int:
        """Number of replies that no call waited for: they came after its timeout, or twice after a cut connection."""
        return self._calls.channel.stray_replies

    def close(self) -> None:
        """Ends the client's threads and connections. Calls that other threads wait for get BrokerUnavailable."""
        self._calls.close()
        if self._local:
            self._local.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, request: CallRequest[T]) -> T:
        return request.convert(self._calls.start(request.service, request.inputs, request.opts).finish())
