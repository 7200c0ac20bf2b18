"""Tokenizes texts and runs them through a sentence-transformers model, dense or sparse, a micro-batch at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from millstream.broker.config.load import ModelSpec
from millstream.broker.contract.embedding import EmbedOptions, InputType
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, MillstreamError, ModelUnavailable
from millstream.broker.contract.job import Json, Vectors
from millstream.worker.models.base import Limit, Prepared, Upcoming
from millstream.worker.models.embedding.tokens import Reader, reader_of, text_of
from millstream.worker.models.kernels.accelerate import accelerate
from millstream.worker.models.kernels.prefetch import Prefetch, to_device
from millstream.worker.models.loading.fetch import fetch_folder
from millstream.worker.models.loading.folder import Folder
from millstream.worker.models.loading.lengths import forget
from millstream.worker.models.loading.library import Loaded, dtype_of, load_encoder
from millstream.worker.models.loading.limits import find_limit, stretch_row
from millstream.worker.models.loading.sharing import (
    PROBES,
    Features,
    Precision,
    Sharing,
    Side,
    group_places,
    measure,
    run_in_groups,
)

_PROMPTS: Mapping[InputType, Sequence[str]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
    "none": (),
}
"""Names of a model's own prompts by input type; the first one that the model has is used."""


class Group(NamedTuple):
    """Properties that rows of one forward share.

    They are the reader, the route in the model, and how many tokens of the prompt are not pooled.
    """

    reader: Reader
    route: str | None
    unpooled: int


# Compared by identity: rows that were prepared together share one.
@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The options of a call, resolved for this model. `prompt` starts each text and has `prompt_tokens` tokens."""

    group: Group
    prompt: str
    prompt_tokens: int
    truncate: str
    options: EmbedOptions


@dataclass(slots=True, eq=False, kw_only=True)
class Text(Prepared):
    """A row whose features are the output of the tokenizer."""

    plan: Plan


class Encoder:
    """One model on one device. The result of a text does not depend on the other texts of its batch."""

    def __init__(
        self, spec: ModelSpec, device: str | None, threads: int, truncate: str, source: Path | None = None
    ) -> None:
        """`source` is the model's checked folder; None fetches it by the model_name of `spec`."""
        torch.set_num_threads(threads)
        self._source = fetch_folder(spec) if source is None else source
        self._spec = spec
        self._truncate = truncate
        self.model = load_encoder(self._source, spec, device)
        self._router = _router(self.model)
        self._readers: dict[tuple[int, int | None], Reader] = {}
        self._limits: dict[Reader, Limit] = {}
        self._pools_prompt = all(getattr(module, "include_prompt", True) for module in self.model.modules())
        most_active = getattr(self.model, "max_active_dims", None)
        self._always: dict[str, Any] = {} if most_active is None else {"max_active_dims": most_active}
        # If the model truncates its vectors, it does not normalize them again.
        self.own_cut: int | None = getattr(self.model, "truncate_dim", None)
        self._prefetch = Prefetch(self.model.device, self._tensors, spec.backend)
        self._packing = accelerate(self.model, spec)
        # Before the limits are tried: a long text changes the state of some models.
        max_tokens = forget(self.model)
        self.plain = self._plan(EmbedOptions())
        # All readers now: finding a reader's limit runs forwards, which the claimer's thread must not do.
        for task in ("query", "document"):
            if self._router is None or task in self._router.sub_modules:
                self._reader(self._route(task), task)
        self._sharing: dict[str | None, Sharing] = {}
        self._measure_sharing(max_tokens)

    @property
    def device_type(self) -> str:
        """The kind of the device, for example "cpu"."""
        return str(self.model.device.type)

    @property
    def limit(self) -> Limit:
        """The limit of a text without options."""
        return self.limit_of(self.plain)

    def limit_of(self, plan: Plan) -> Limit:
        """Returns the limit of a text of `plan`."""
        return self._limits[plan.group.reader]

    def fingerprint(self, *what: str) -> str:
        """Names the weights, the other files that decide vectors, the dtype, and `what` else decides them."""
        return Folder(self._source, self._spec.revision).fingerprint(self._spec, dtype_of(self.model), *what)

    def _measure_sharing(self, max_tokens: float) -> None:
        """Measures for each route which rows may share a forward. Packed rows may: Packing.of tested it."""
        if self._packing:
            self._sharing[None] = Sharing()
            return
        precision = Precision.of(self.model, self.device_type, self._spec.backend)
        for task in self._tasks():
            plan = self._plan(EmbedOptions(truncate="end", input_type=task))
            reader = plan.group.reader
            if plan.group.route in self._sharing:
                continue
            if reader.shares_any:
                self._sharing[plan.group.route] = Sharing()
                continue
            rows = [row for row in self.prepare(PROBES, plan) if isinstance(row, Text)]
            self._sharing[plan.group.route] = measure(
                self._run_padded, rows, ("right", reader.side), max_tokens, precision
            )

    def _tasks(self) -> list[InputType]:
        """Returns one input type for each route of the model."""
        if self._router is None:
            return ["none"]
        tasks: tuple[InputType, ...] = ("none", "query", "document")
        return [task for task in tasks if task == "none" or task in self._router.sub_modules]

    # -- in the claimer's thread -------------------------------------------------------------------------------------

    def plan(self, options: Mapping[str, Json]) -> Plan:
        """Returns the plan for `options`. Raises InvalidRequest if the model cannot follow them."""
        return self._plan(EmbedOptions.read(options)) if options else self.plain

    def prepare(self, inputs: Sequence[Json], plan: Plan) -> list[Prepared | MillstreamError]:
        """Returns for each input a row, or its own error, for example if it is not a string or too long."""
        rows: list[Prepared | MillstreamError] = [
            InvalidRequest(f"not a string but {type(text).__name__}", hint="embed takes strings") for text in inputs
        ]
        texts = [(at, plan.prompt + text) for at, text in enumerate(inputs) if isinstance(text, str)]
        if not texts:
            return rows
        for (at, text), tokens in zip(texts, plan.group.reader.read([text for _, text in texts]), strict=True):
            rows[at] = _row(text, tokens, plan)
        return rows

    def tokens(self, text: str, plan: Plan) -> int:
        """Returns how many tokens the text has, with its prompt and not truncated."""
        return len(plan.group.reader.read([plan.prompt + text])[0]["input_ids"])

    def samples(self, tokens: int) -> Sequence[Json]:
        plan = self.plain
        return [text_of(min(tokens, plan.group.reader.limit), lambda text: self.tokens(text, plan))]

    def _plan(self, options: EmbedOptions) -> Plan:
        task = None if options.input_type == "none" else options.input_type
        route = self._route(task)
        reader = self._reader(route, task)
        prompt = self._prompt(options)
        tokens = reader.prompt_tokens(prompt) if prompt else 0
        group = Group(reader, route, 0 if self._pools_prompt else tokens)
        return Plan(group, prompt, tokens, options.truncate or self._truncate, options)

    def _prompt(self, options: EmbedOptions) -> str:
        """Returns the prompt that encode, encode_query or encode_document would use."""
        if options.prompt is not None:
            return options.prompt
        names = [name for name in _PROMPTS[options.input_type or "none"] if name in self.model.prompts]
        name = names[0] if names else self.model.default_prompt_name
        return self.model.prompts.get(name or "") or ""

    def _route(self, task: str | None) -> str | None:
        """Returns the route for texts of `task`; None if the model has no router.

        Raises InvalidRequest if the router has no route for `task`.
        """
        if self._router is None:
            return None
        routes = self._router.sub_modules
        route = task or ("text" if "text" in routes else self._router.default_route)
        if route not in routes:
            raise InvalidRequest(f"the model has no route for input_type={task!r}", hint=f"one of {', '.join(routes)}")
        return cast(str, route)

    def _reader(self, route: str | None, task: str | None) -> Reader:
        module = self.model[0] if self._router is None else self._router.sub_modules[route][0]
        # One reader for equal settings: only rows of one reader share a forward.
        key = id(module), getattr(module, f"{task}_length", None)
        if key not in self._readers:
            self._readers[key] = self._with_limit(reader_of(module, self._spec.max_length, task), route)
        return self._readers[key]

    def _with_limit(self, reader: Reader, route: str | None) -> Reader:
        """Sets the limit of `reader` to the one that the model is found to have. Raises ModelUnavailable."""
        plan = Plan(Group(reader, route, 0), "", 0, "none", EmbedOptions())
        # If the vocabulary has no "a", the row has special tokens only.
        short = {name: list(values) or [0] for name, values in reader.read(["a"])[0].items()}

        def forward(tokens: int) -> torch.Tensor:
            with torch.inference_mode():
                return self._run_padded([Text(tokens, stretch_row(short, tokens), plan=plan)], "right")

        limit = find_limit(reader.limit, forward, self._spec.max_length)
        reader.limit = limit.tokens
        self._limits[reader] = limit
        return reader

    # -- in the main thread --------------------------------------------------------------------------------------

    def foresee(self, upcoming: Upcoming) -> None:
        self._prefetch.foresee(lambda: self._of_one_forward(upcoming()))

    def _of_one_forward(self, rows: Sequence[Prepared]) -> Sequence[Prepared]:
        """Returns the rows if one forward runs them all, else none."""
        return rows if len(self._groups(cast(Sequence[Text], rows))) == 1 else ()

    @property
    def packs(self) -> bool:
        """Whether texts of different lengths share a forward without padding."""
        return self._packing is not None

    def run(self, rows: Sequence[Prepared]) -> Vectors:
        """Returns the vectors that the model's own call returns for each text alone, float32 [rows, dim], in order.

        Takes one forward, or more if some rows may not share one.
        """
        texts = cast(Sequence[Text], rows)
        with torch.inference_mode():
            vectors = run_in_groups(self._groups(texts), lambda places: self._vectors([texts[at] for at in places]))
            self._prefetch.make_next()
            vectors = vectors[:, : self.own_cut].to(torch.float32)
            return cast(Vectors, vectors.cpu().numpy().astype(np.float32, copy=False))

    def _groups(self, texts: Sequence[Text]) -> list[list[int]]:
        """Returns the places of texts that share a forward, for each forward."""
        return group_places(
            (text.plan.group, self._sharing[text.plan.group.route].key(at, text.tokens))
            for at, text in enumerate(texts)
        )

    def _vectors(self, texts: Sequence[Text]) -> torch.Tensor:
        """Returns the model's output for texts that may share a forward."""
        # A single text needs no padding.
        if self._packing and len(texts) > 1:
            return self._packing.run([cast(Features, text.features) for text in texts])
        return self._forward(texts, self._prefetch.batch(texts))

    def _run_padded(self, texts: Sequence[Text], side: Side) -> torch.Tensor:
        return self._forward(texts, to_device(_batch(texts, side), self.model.device))

    def _forward(self, texts: Sequence[Text], features: dict[str, Any]) -> torch.Tensor:
        group = texts[0].plan.group
        if group.unpooled:
            features["prompt_length"] = group.unpooled
        routed = {} if group.route is None else {"task": group.route}
        return cast(torch.Tensor, self.model(features, **self._always, **routed)["sentence_embedding"])

    def _tensors(self, rows: Sequence[Prepared]) -> Mapping[str, torch.Tensor]:
        texts = cast(Sequence[Text], rows)
        return _batch(texts, self._sharing[texts[0].plan.group.route].side)


def _batch(texts: Sequence[Text], side: Side) -> Mapping[str, torch.Tensor]:
    return texts[0].plan.group.reader.batch([cast(Features, text.features) for text in texts], side)


def _row(text: str, tokens: Features, plan: Plan) -> Prepared | MillstreamError:
    reader, count = plan.group.reader, len(tokens["input_ids"])
    if count == 0 and not reader.reads_empty:
        return InvalidRequest("the model's tokenizer makes no token of the text", hint="pass at least one word")
    if count <= reader.limit:
        return Text(max(1, count), tokens, plan=plan)
    if plan.prompt_tokens >= reader.limit:
        return InputTooLong(
            f"the prompt alone has {plan.prompt_tokens} tokens, the model reads {reader.limit}", hint="shorten it"
        )
    if plan.truncate in ("start", "end"):
        cut = reader.cut(text, tokens, plan.truncate, plan.prompt_tokens)
        return Text(len(cut["input_ids"]), cut, truncated=True, plan=plan)
    return InputTooLong(f"{count} tokens, the model reads {reader.limit}", hint='shorten it, or pass truncate="end"')


def _router(model: Loaded) -> Any:
    """Returns the first module if it routes by input type, else None. Raises ModelUnavailable for other routers."""
    router = cast(Any, model[0])
    if not hasattr(router, "sub_modules"):
        return None
    if getattr(router, "route_mappings", None):
        raise ModelUnavailable(
            "the model routes by modality", hint="only models that route by query and document can run"
        )
    if router.default_route is None and "text" not in router.sub_modules:
        raise ModelUnavailable(
            "the model has no route for a text without input_type", hint="give its router a default_route"
        )
    return router
