"""Models that a server of their own runs: checks of rows, identity of the server, and the engine. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar, cast

import httpx

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.embedding import EmbedOptions
from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelUnavailable
from millstream.broker.contract.generation import GenerateOptions
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import EMBED, GENERATE, RERANK
from millstream.broker.contract.partial import Record
from millstream.broker.contract.prompt import Prompt
from millstream.broker.contract.rerank import RerankOptions
from millstream.worker.engines.upstream import Generating, Requests, Upstream
from millstream.worker.engines.upstream_http import CONNECT_S, Endpoint
from millstream.worker.engines.upstream_limit import Shares
from millstream.worker.engines.upstream_rows import Embedding, Item, Reranking
from millstream.worker.engines.upstream_text import Ollama, OpenAI, Route, Text
from millstream.worker.engines.upstream_wire import Exchange, Server, message_of
from millstream.worker.models.base import NO_OPTIONS, Prepared
from millstream.worker.scheduling.active_job import Rows
from millstream.worker.scheduling.batcher import Row
from millstream.worker.scheduling.upstream_limit import Backoff

log = logging.getLogger(__name__)

BYTES_A_TOKEN = 4
"""UTF-8 bytes of a token, for estimates: only the server has the tokenizer."""

STALL_S = 120.0
"""Seconds without a byte after which a request counts as broken, if `stall_timeout` is not set. The first byte of a
text comes after the server's own queue and the whole prompt."""

_HEALTH: Mapping[str, str] = {"openai": "/models", "tei": "/health", "ollama": "/api/version"}
"""Paths that show whether a server lives, by backend."""

_IDENTITY: Mapping[str, str] = {"openai": "/models", "tei": "/info", "ollama": "/api/tags"}
"""Paths at which a server says what it runs, by backend."""

_STABLE = ("id", "root", "owned_by", "max_model_len", "meta", "model_id", "model_sha", "model_dtype", "name", "digest")
"""Fields of a server's answer that name the weights. Others, such as `created`, change when it starts again."""


def estimated_tokens(text: str) -> int:
    return max(1, len(text.encode(errors="replace")) // BYTES_A_TOKEN)


# -- rows ----------------------------------------------------------------------------------------------------------


class _Texts:
    """Requests for texts, one a row."""

    rows = 1

    def __init__(self, route: Route) -> None:
        self._route = route

    def group(self, rows: Rows) -> Sequence[Exchange]:
        return [Generating(row, self._route) for row in rows]


class _Batches:
    """Requests for many rows each: at most `rows` of them, and about `tokens` tokens."""

    def __init__(self, make: Callable[[Rows], Exchange], rows: int, tokens: int) -> None:
        self._make = make
        self.rows = rows
        self._tokens = tokens

    def group(self, rows: Rows) -> Sequence[Exchange]:
        groups: dict[object, list[Row[Prepared]]] = {}
        for row in rows:
            item = cast(Item, row.payload.features)
            groups.setdefault((item.group, item.part), []).append(row)
        return [self._make(part) for group in groups.values() for part in self._parts(group)]

    def _parts(self, rows: Rows) -> Sequence[Rows]:
        parts: list[Rows] = [[]]
        tokens = 0
        for row in rows:
            if parts[-1] and (len(parts[-1]) >= self.rows or tokens + row.tokens > self._tokens):
                parts.append([])
                tokens = 0
            parts[-1].append(row)
            tokens += row.tokens
        return parts


# -- models --------------------------------------------------------------------------------------------------------


class _Model:
    """Common part of the models of all types. `server`: facts that it states of itself."""

    op: str
    sample_options = NO_OPTIONS
    packs = True
    """Rows of all lengths share a request, the most urgent first."""

    def __init__(self, spec: ServiceSpec, endpoint: Endpoint, server: Server, fingerprint: str) -> None:
        self._spec = spec
        self._endpoint = endpoint
        self._server = server
        self.url = endpoint.url
        self.fingerprint = fingerprint
        self._shares: Shares | None = None
        self._waiting: Callable[[], int] = lambda: 0
        self._engine: Upstream | None = None

    def share_by(self, shares: Shares, waiting: Callable[[], int]) -> None:
        self._shares, self._waiting = shares, waiting

    def _requests(self) -> Requests:
        raise NotImplementedError

    def start_engine(self) -> Upstream:
        self._engine = Upstream(self._endpoint, self._requests(), self._server, self._shares, self._waiting)
        return self._engine

    def close(self) -> None:
        if self._engine:
            self._engine.close()

    def samples(self, tokens: int) -> Sequence[Json]:
        """None: requests to a server warm up no worker."""
        return ()

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        """Raises NotImplementedError: the engine runs the rows."""
        raise NotImplementedError


class UpstreamLlm(_Model):
    """A language model on a server."""

    op = GENERATE.op

    def __init__(self, spec: ServiceSpec, endpoint: Endpoint, server: Server, fingerprint: str) -> None:
        super().__init__(spec, endpoint, server, fingerprint)
        self._route: Route = Ollama() if spec.model.backend == "ollama" else OpenAI()

    def _requests(self) -> Requests:
        return _Texts(self._route)

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        try:
            read = GenerateOptions.read(options)
        except InvalidRequest as error:
            return [error] * len(inputs)
        return [self._row(value, read) for value in inputs]

    def _row(self, value: Json, options: GenerateOptions) -> Prepared | MillstreamError:
        try:
            prompt = Prompt.read(value)
            self._route.check(prompt, options, self._server)
        except InvalidRequest as error:
            return error
        ids = prompt.token_ids
        tokens = len(ids) if ids is not None else estimated_tokens(prompt.text or json.dumps(prompt.json()))
        return Prepared(tokens, Text(prompt, options, self._spec.model.model_name))

    def begin(self, row: Prepared, job_id: str, records: Sequence[Record]) -> None:
        cast(Text, row.features).begin(job_id, records)


class UpstreamEmbedding(_Model):
    """An embedding model on a server. Vectors are cut, normalized and encoded here, as for models in the worker."""

    op = EMBED.op

    def _requests(self) -> Requests:
        model, runtime = self._spec.model, self._spec.runtime
        return _Batches(
            lambda rows: Embedding(rows, model.backend, model.model_name), runtime.batch_size, runtime.batch_tokens
        )

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        try:
            read = EmbedOptions.read(options)
            truncate = read.truncate or self._spec.runtime.truncate
            read = read._replace(truncate=truncate)
            self._check(read)
        except InvalidRequest as error:
            return [error] * len(inputs)
        group = None
        if self._spec.model.backend != "openai":
            group = (read.truncate, read.normalize is False, read.input_type)
        return [_row(value, read.prompt or "", read, group) for value in inputs]

    def _check(self, options: EmbedOptions) -> None:
        """Raises InvalidRequest if the server has no way to say it."""
        backend = self._spec.model.backend
        _check_truncate(backend, options.truncate)
        if options.input_type in ("query", "document") and backend != "tei":
            raise InvalidRequest(
                f"input_type={options.input_type!r}: a server of backend {backend} takes no input type",
                hint="put the model's text for it into `prompt`",
            )


class UpstreamReranker(_Model):
    """A reranker on a server."""

    op = RERANK.op

    def _requests(self) -> Requests:
        model, runtime = self._spec.model, self._spec.runtime
        return _Batches(
            lambda rows: Reranking(rows, model.backend, model.model_name), runtime.batch_size, runtime.batch_tokens
        )

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        try:
            read = RerankOptions.read(options)
            read = read._replace(truncate=read.truncate or self._spec.runtime.truncate)
            self._check(read)
        except InvalidRequest as error:
            return [error] * len(inputs)
        return [_row(value, "", read, read) for value in inputs]

    def _check(self, options: RerankOptions) -> None:
        """Raises InvalidRequest if the server has no way to say it."""
        backend = self._spec.model.backend
        _check_truncate(backend, options.truncate)
        if options.instruction:
            raise InvalidRequest("an instruction: rerank routes of servers take none", hint="put it into the query")
        if options.scores == "raw" and backend != "tei":
            raise InvalidRequest(
                f'scores="raw": a server of backend {backend} gives scores through its own activation only',
                hint="leave scores out",
            )


def _check_truncate(backend: str, truncate: str | None) -> None:
    refused = {"openai": ("start", "end"), "ollama": ("start",)}.get(backend, ())
    if truncate in refused:
        raise InvalidRequest(
            f"truncate={truncate!r}: a server of backend {backend} cuts texts by its own settings only",
            hint="leave truncate out",
        )


def _row(value: Json, prompt: str, options: EmbedOptions | RerankOptions, group: object) -> Prepared | MillstreamError:
    if not isinstance(value, str):
        return InvalidRequest(f"not a string but {type(value).__name__}")
    query = options.query if isinstance(options, RerankOptions) else ""
    text = prompt + value
    return Prepared(estimated_tokens(query + text), Item(text, options, group))


# -- loading -------------------------------------------------------------------------------------------------------

M = TypeVar("M", bound=_Model)


def load_llm(spec: ServiceSpec, device: str | None, threads: int, folder: str) -> UpstreamLlm:
    """Returns the language model of `spec`, on its server. Waits until the server is there. Raises ModelUnavailable."""
    return _Loader(UpstreamLlm, spec).load()


def load_embedding(spec: ServiceSpec, device: str | None, threads: int, folder: str) -> UpstreamEmbedding:
    """Returns the embedding model of `spec`, as `load_llm` does."""
    return _Loader(UpstreamEmbedding, spec).load()


def load_reranker(spec: ServiceSpec, device: str | None, threads: int, folder: str) -> UpstreamReranker:
    """Returns the reranker of `spec`, as `load_llm` does."""
    return _Loader(UpstreamReranker, spec).load()


class _Loader(Generic[M]):
    """Asks a server what it runs."""

    def __init__(self, kind: type[M], spec: ServiceSpec) -> None:
        self._kind = kind
        self._spec = spec
        self._model = spec.model
        self._endpoint = endpoint_of(spec)

    def load(self) -> M:
        entry = self._identity()
        server = Server(str(entry.get("owned_by", "")).replace(".", "").lower())
        stable = {key: entry[key] for key in _STABLE if key in entry}
        digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()[:12] if stable else ""
        named = f"upstream:{self._model.backend}:{self._model.model_name}"
        return self._kind(self._spec, self._endpoint, server, f"{named}:{digest}" if digest else named)

    def _identity(self) -> Mapping[str, object]:
        """Facts that the server states of the model; empty if it states none. Waits until the server is there."""
        pauses, began = Backoff(0.2, 5.0), time.monotonic()
        while True:
            reason, answer = self._ask()
            if answer is not None:
                if pauses.until:
                    log.info("%s is there after %.1f s", self._endpoint.url, time.monotonic() - began)
                return self._entry(answer)
            if not pauses.until:
                log.warning("%s is away, the worker starts when it is there: %s", self._endpoint.url, reason)
            time.sleep(pauses.fail(time.monotonic()))

    def _ask(self) -> tuple[str, object]:
        """Returns a reason and None if no server is there, else its answer; {} if it does not say what it runs."""
        url = self._endpoint.url + _IDENTITY[self._model.backend]
        headers = {"authorization": f"Bearer {self._endpoint.key}"} if self._endpoint.key else {}
        try:
            response = httpx.get(
                url,
                headers=headers,
                timeout=httpx.Timeout(30.0, connect=CONNECT_S),
                verify=ssl.create_default_context(),
                trust_env=False,
            )
        except (httpx.HTTPError, OSError) as error:
            return str(error) or type(error).__name__, None
        if response.status_code in (401, 403):
            raise ModelUnavailable(
                f"{self._endpoint.url} refuses the key of this worker: HTTP {response.status_code}: "
                f"{message_of(response.content)}",
                hint="name the key by api_key_file or api_key_env in this host's own config.yaml, with the same url",
            )
        if response.status_code in (429, 502, 503, 504):
            return f"HTTP {response.status_code}", None
        try:
            return "", response.json() if response.status_code == 200 else {}
        except ValueError:
            return "", {}

    def _entry(self, answer: object) -> Mapping[str, object]:
        """The part of the answer that is about the model. Raises ModelUnavailable if the server does not have it."""
        if not isinstance(answer, dict):
            return {}
        listed = answer.get("data") if "data" in answer else answer.get("models")
        if not isinstance(listed, list):
            return answer
        entries = {str(each.get("id", each.get("name"))): each for each in listed if isinstance(each, dict)}
        name = self._model.model_name
        found = entries.get(name) or entries.get(f"{name}:latest")
        if entries and found is None:
            raise ModelUnavailable(
                f"{self._endpoint.url} has no model {name!r}", hint=f"it has: {', '.join(sorted(entries)[:10])}"
            )
        return found or {}


def endpoint_of(spec: ServiceSpec) -> Endpoint:
    """Returns the server of a service. Raises ModelUnavailable if its key cannot be read."""
    model = spec.model
    if not model.url:
        raise ModelUnavailable(f"service {spec.name!r} names no server", hint="set models.<name>.url in config.yaml")
    return Endpoint(model.url, _key(model), _HEALTH[model.backend], spec.runtime.stall_timeout or STALL_S)


def _key(model: ModelSpec) -> str:
    """The key of the server; "" if none is named. Raises ModelUnavailable."""
    key = ""
    if model.api_key_file:
        try:
            key = model.api_key_file.read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelUnavailable(f"api_key_file cannot be read: {error}") from None
    elif model.api_key_env:
        key = os.environ.get(model.api_key_env, "").strip()
    else:
        return ""
    if not key or not key.isascii() or not key.isprintable():
        place = model.api_key_file or model.api_key_env
        raise ModelUnavailable(f"{place} holds no key", hint="a key is one line of printable ASCII characters")
    return key
