"""Types of models, and everything that differs between them: a record a type.

To add a type is to add a record here and the module that loads it. No other module compares the name of a type or of
an operation. Loaders are names, so that this module imports no worker; it imports no numpy either, since every command
reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from millstream.broker.contract.embedding import EmbedOptions
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.generation import GenerateOptions
from millstream.broker.contract.rerank import RerankOptions

if TYPE_CHECKING:
    from millstream.broker.contract.job import Json

ModelType = Literal["embedding", "reranker", "llm", "custom", "echo", "echo-stream"]

Backend = Literal["torch", "onnx", "openvino", "openai", "tei", "ollama"]
"""Program that runs the weights: a library in the worker, or a server that already runs."""

Row = Literal["text", "payload", "prompt"]
"""Input of one row: a string, any JSON value, or a prompt as prompt.py has it."""

ResultKind = Literal["vectors", "scores", "generations", "any"]
"""Results of a call's rows: vectors, dense or sparse but not both; numbers; texts as generation.py has them; or any
values, vectors included."""

Check = Callable[[Mapping[str, "Json"]], int]
"""Checks the options of one call. Returns the UTF-8 bytes that the model reads beside each row. Raises InvalidRequest.

Clients call it before they send. Workers read options with the same classes, since a job may come from any client.
"""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Texts and options for which all workers of a service must give the same answer."""

    texts: tuple[str, ...]
    """Rows of one forward."""

    options: Mapping[str, Json]
    """Options of the call."""


def _ignore_options(options: Mapping[str, Json]) -> int:
    return 0


def _check_embed(options: Mapping[str, Json]) -> int:
    if options:
        EmbedOptions.read(options)
    return 0


def _check_rerank(options: Mapping[str, Json]) -> int:
    return RerankOptions.read(options).size


def _check_generate(options: Mapping[str, Json]) -> int:
    if options:
        GenerateOptions.read(options)
    return 0


def _refuse_options(options: Mapping[str, Json]) -> int:
    if options:
        raise InvalidRequest("a custom service takes no options", hint="put them into the payload")
    return 0


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One type of model: how it is called, what it takes, what it answers, who loads it."""

    type: ModelType
    """Name in config.yaml."""

    op: str
    """Name on the wire, at most 64 of A-Z a-z 0-9 _ . -"""

    loader: str = ""
    """Function that loads a model, as "module:name"; empty if this version has no worker for the type."""

    upstreams: Mapping[str, str] = field(default_factory=dict)
    """Loaders as "module:name", by the backend, if a server that already runs can compute the results."""

    row: Row = "text"
    """Input of one row."""

    results: ResultKind = "any"
    """Results of the rows. A result that a call cannot have is that row's error."""

    check: Check = _ignore_options
    """Checks a call's options."""

    even_cost: bool = False
    """Whether each row counts an equal share of a batch; otherwise a row counts by its length."""

    uncached: str = ""
    """Reason why answers cannot be cached; empty if they can."""

    compared: bool = False
    """Whether results of different calls are compared, so that a caller should stay with one version of the model."""

    streams: bool = False
    """Whether a job has one row whose text grows and is shown while it runs."""

    needs_code: bool = False
    """Whether config.yaml names a function to run, `handler`."""

    needs_weights: bool = False
    """Whether config.yaml names weights, `model_name`, and may choose their `kernels`."""

    one_forward: bool = False
    """Whether one forward of the weights gives the answer, at a cost in proportion to its padded tokens.

    Then `max_batch_tokens: auto` is measured, and `backend` can be chosen.
    """

    kinds: tuple[str, ...] = ()
    """Values of `kind` in config.yaml, beside "auto": ways to use a model that its files do not ask for."""

    agreement: Agreement | None = None
    """Texts that each worker answers when it starts, to prove that it computes as the others; None for no proof."""

    computes: bool = True
    """Whether a forward keeps the cores of its host busy."""

    libraries: tuple[str, ...] = ()
    """Python packages that must be installed to load a model."""

    organization: str = ""
    """Organization on the hub whose models may be named without it, as in sentence-transformers; empty for none."""

    gen_ai: str = ""
    """Name in the gen_ai conventions of OpenTelemetry, for a prompt that is no chat; empty if they have none."""

    example: Mapping[str, Json] = field(default_factory=dict)
    """Options of a call that needs some, for measurements."""

    defaults: Mapping[str, object] = field(default_factory=dict)
    """Defaults of `runtime` in config.yaml that differ from those of other types."""

    @property
    def runs(self) -> bool:
        """Whether this version has a worker for the type."""
        return bool(self.loader)

    def upstream(self, backend: str) -> Operation:
        """Returns the record of the same type if the server of `backend` computes the results, without weights here."""
        return replace(
            self,
            loader=self.upstreams[backend],
            needs_weights=False,
            one_forward=False,
            agreement=None,
            computes=False,
            libraries=("httpx",),
            organization="",
        )


STREAMING_DEFAULTS: Mapping[str, object] = {"max_attempts": 5}
"""Defaults of types that stream. Texts of other jobs go on behind their last record after a death, so one more death
costs them little; a text that is buried although others' deaths hit it costs its caller all of it."""

EMBED = Operation(
    "embedding",
    "embed",
    "millstream.worker.models.embedding.embedding:load",
    dict.fromkeys(("openai", "tei", "ollama"), "millstream.worker.engines.upstream_model:load_embedding"),
    results="vectors",
    compared=True,
    gen_ai="embeddings",
    check=_check_embed,
    needs_weights=True,
    one_forward=True,
    agreement=Agreement(("The mill turns in the stream, 24 hours a day: who grinds the corn?",), {"truncate": "end"}),
    libraries=("torch", "sentence_transformers"),
    defaults={
        "batch_size": 64,
        "batch_timeout": 0.01,
        "max_queue_size": 10_000,
        "worker_count": 2,
        "total_timeout": 60.0,
    },
)

RERANK = Operation(
    "reranker",
    "rerank",
    "millstream.worker.models.reranking.reranker:load",
    dict.fromkeys(("openai", "tei"), "millstream.worker.engines.upstream_model:load_reranker"),
    results="scores",
    compared=True,
    check=_check_rerank,
    needs_weights=True,
    one_forward=True,
    kinds=("query_likelihood",),
    agreement=Agreement(
        ("The miller grinds the corn.", "A stream turns the mill.", "Rain, snow and 12 winds."),
        {"query": "corn", "truncate": "end", "scores": "raw"},
    ),
    libraries=("torch", "sentence_transformers"),
    organization="cross-encoder",
    example={"query": "which of these texts is about a mill on a stream?"},
    defaults={
        "batch_size": 32,
        "batch_timeout": 0.02,
        "max_queue_size": 2_000,
        "worker_count": 2,
        "total_timeout": 60.0,
    },
)

GENERATE = Operation(
    "llm",
    "generate",
    "millstream.worker.generation.model:load",
    upstreams=dict.fromkeys(("openai", "ollama"), "millstream.worker.engines.upstream_model:load_llm"),
    row="prompt",
    results="generations",
    gen_ai="text_completion",
    check=_check_generate,
    uncached="its answers are streamed",
    streams=True,
    needs_weights=True,
    # Otherwise a text ends with the model's context.
    example={"max_tokens": 64},
    # sentence-transformers: its helper modules find the folder, the weights and the device.
    libraries=("torch", "sentence_transformers"),
    # Texts join the running ones at every step, so no batch waits for more of them. A single prompt is often longer
    # than 2,048 tokens. Prompts are few, and each takes long to compute.
    defaults={
        "batch_size": 4,
        "batch_timeout": 0.0,
        "max_queue_size": 200,
        "worker_count": 1,
        "total_timeout": 300.0,
        "max_batch_tokens": 8_192,
        "rate_limit": {"requests": 10.0},
        **STREAMING_DEFAULTS,
    },
)

CALL = Operation(
    "custom",
    "call",
    "millstream.worker.models.custom:load",
    row="payload",
    check=_refuse_options,
    even_cost=True,
    uncached="nothing tells whether its code has changed",
    needs_code=True,
)

# Any options: `embed` may call an echo service, too, and `generate` an echo-stream service.
ECHO = Operation("echo", "echo", "millstream.worker.models.echo:load", computes=False)

STREAM = Operation(
    "echo-stream",
    "stream",
    "millstream.worker.models.echo_stream:load",
    row="payload",
    uncached="its answers are streamed",
    streams=True,
    computes=False,
    defaults=STREAMING_DEFAULTS,
)

OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {each.type: each for each in (EMBED, RERANK, GENERATE, CALL, ECHO, STREAM)}
)
"""By type."""

UPSTREAM_BACKENDS = frozenset(backend for each in OPERATIONS.values() for backend in each.upstreams)
"""Values of `backend` that name a server which already runs."""


@cache
def operation_of(kind: str, backend: str) -> Operation:
    """Returns the record of models of type `kind` that `backend` runs."""
    operation = OPERATIONS[kind]
    return operation.upstream(backend) if backend in operation.upstreams else operation


BY_OP: Mapping[str, Operation] = MappingProxyType({each.op: each for each in OPERATIONS.values()})
"""By name on the wire."""

RUNNABLE: tuple[ModelType, ...] = tuple(each.type for each in OPERATIONS.values() if each.runs)
"""Types that this version has a worker for."""

STREAMING_OPS = frozenset(each.op for each in OPERATIONS.values() if each.streams)
"""Names on the wire of operations that stream."""


def types_with(holds: Callable[[Operation], bool]) -> str:
    """Returns the types whose record `holds` accepts, for a message, as in "embedding and reranker"."""
    return " and ".join(each.type for each in OPERATIONS.values() if holds(each))
