"""Texts to the raw output of a sentence-transformers model, dense or sparse: read once, run a micro-batch at a time."""

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
from millstream.worker.models.kernels.packing import Packing
from millstream.worker.models.kernels.prefetch import Prefetch, sent
from millstream.worker.models.loading.fetch import local
from millstream.worker.models.loading.lengths import forget
from millstream.worker.models.loading.limits import settled, stretched_row
from millstream.worker.models.loading.loading import Folder, Loaded, dtype_of, load
from millstream.worker.models.loading.sharing import (
    PROBES,
    Features,
    Precision,
    Sharing,
    Side,
    grouped,
    in_groups,
    measured,
)

_PROMPTS: Mapping[InputType, Sequence[str]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
    "none": (),
}
"""The names of a model's own prompts, the first that it has."""


class Way(NamedTuple):
    """What the rows of one forward share: reader, the model's route, how many tokens of a prompt are not pooled."""

    reader: Reader
    route: str | None
    unpooled: int


# Compared by identity: one for all rows that were prepared together.
@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """What a call's options come to on this model. `prompt_tokens` are the prompt's, at the start of each text."""

    way: Way
    prompt: str
    prompt_tokens: int
    truncate: str
    options: EmbedOptions


@dataclass(slots=True, eq=False, kw_only=True)
class Text(Prepared):
    """A row; its features are what the tokenizer made of it."""

    wish: Wish


class Encoder:
    """One model on one device. What it gives for a text does not depend on the texts beside it."""

    def __init__(
        self, spec: ModelSpec, device: str | None, threads: int, truncate: str, source: Path | None = None
    ) -> None:
        """`source` is the model's folder, looked over, if it is not what `spec` names an embedding model by."""
        torch.set_num_threads(threads)
        self._source = local(spec) if source is None else source
        self._spec = spec
        self._truncate = truncate
        self.model = load(self._source, spec, device)
        self._router = _router(self.model)
        self._readers: dict[tuple[int, int | None], Reader] = {}
        self._limits: dict[Reader, Limit] = {}
        self._pools_prompt = all(getattr(module, "include_prompt", True) for module in self.model.modules())
        most_active = getattr(self.model, "max_active_dims", None)
        self._always: dict[str, Any] = {} if most_active is None else {"max_active_dims": most_active}
        # Where the model cuts its vectors, it does not make them unit vectors again.
        self.own_cut: int | None = getattr(self.model, "truncate_dim", None)
        self._prefetch = Prefetch(self.model.device, self._tensors, spec.backend)
        self._packing = Packing.of(self.model) if spec.backend == "torch" and self._pools_prompt else None
        # First: a text at the limit would leave something behind in some models.
        upto = forget(self.model)
        self.plain = self._wish(EmbedOptions())
        # All of them now: a reader's limit is run, which the claimer's thread must not do.
        for task in ("query", "document"):
            if self._router is None or task in self._router.sub_modules:
                self._reader(self._route(task), task)
        self._sharing: dict[str | None, Sharing] = {}
        self._measure_sharing(upto)

    @property
    def device_type(self) -> str:
        """The kind of device that runs forwards."""
        return str(self.model.device.type)

    @property
    def limit(self) -> Limit:
        """That of a text without options."""
        return self.limit_of(self.plain)

    def limit_of(self, wish: Wish) -> Limit:
        """That of a text of `wish`."""
        return self._limits[wish.way.reader]

    def fingerprint(self, *what: str) -> str:
        """Names the weights, the other files that make vectors, the dtype and `what` else counts."""
        return Folder(self._source, self._spec.revision).fingerprint(self._spec, dtype_of(self.model), *what)

    def _measure_sharing(self, upto: float) -> None:
        """For each route, how its rows may share a forward. Packed ones may; that was measured, too."""
        if self._packing:
            self._sharing[None] = Sharing()
            return
        precision = Precision.of(self.model, self.device_type, self._spec.backend)
        for task in self._tasks():
            wish = self._wish(EmbedOptions(truncate="end", input_type=task))
            reader = wish.way.reader
            if wish.way.route in self._sharing:
                continue
            if reader.shares_any:
                self._sharing[wish.way.route] = Sharing()
                continue
            rows = [row for row in self.prepare(PROBES, wish) if isinstance(row, Text)]
            self._sharing[wish.way.route] = measured(self._padded, rows, ("right", reader.side), upto, precision)

    def _tasks(self) -> list[InputType]:
        """One for each route of the model."""
        if self._router is None:
            return ["none"]
        tasks: tuple[InputType, ...] = ("none", "query", "document")
        return [task for task in tasks if task == "none" or task in self._router.sub_modules]

    # -- the claimer's side ------------------------------------------------------------------------------------------

    def wish(self, options: Mapping[str, Json]) -> Wish:
        """What `options` come to. Raises InvalidRequest."""
        return self._wish(EmbedOptions.read(options)) if options else self.plain

    def prepare(self, inputs: Sequence[Json], wish: Wish) -> list[Prepared | MillstreamError]:
        """Each input as a row, or the error that row alone gets: not a string, too long."""
        rows: list[Prepared | MillstreamError] = [
            InvalidRequest(f"not a string but {type(text).__name__}", hint="embed takes strings") for text in inputs
        ]
        texts = [(at, wish.prompt + text) for at, text in enumerate(inputs) if isinstance(text, str)]
        if not texts:
            return rows
        for (at, text), tokens in zip(texts, wish.way.reader.read([text for _, text in texts]), strict=True):
            rows[at] = _row(text, tokens, wish)
        return rows

    def tokens(self, text: str, wish: Wish) -> int:
        """How many tokens the text has with its prompt, uncut."""
        return len(wish.way.reader.read([wish.prompt + text])[0]["input_ids"])

    def samples(self, tokens: int) -> Sequence[Json]:
        wish = self.plain
        return [text_of(min(tokens, wish.way.reader.limit), lambda text: self.tokens(text, wish))]

    def _wish(self, options: EmbedOptions) -> Wish:
        task = None if options.input_type == "none" else options.input_type
        route = self._route(task)
        reader = self._reader(route, task)
        prompt = self._prompt(options)
        tokens = reader.prompt_tokens(prompt) if prompt else 0
        way = Way(reader, route, 0 if self._pools_prompt else tokens)
        return Wish(way, prompt, tokens, options.truncate or self._truncate, options)

    def _prompt(self, options: EmbedOptions) -> str:
        """The one that encode, encode_query or encode_document would take."""
        if options.prompt is not None:
            return options.prompt
        names = [name for name in _PROMPTS[options.input_type or "none"] if name in self.model.prompts]
        name = names[0] if names else self.model.default_prompt_name
        return self.model.prompts.get(name or "") or ""

    def _route(self, task: str | None) -> str | None:
        """The route that texts of `task` take; None where the model has one way for all.

        Raises InvalidRequest where it has none for them.
        """
        if self._router is None:
            return None
        routes = self._router.sub_modules
        route = task or ("text" if "text" in routes else self._router.default_route)
        if route not in routes:
            raise InvalidRequest(f"the model has no way for input_type={task!r}", hint=f"one of {', '.join(routes)}")
        return cast(str, route)

    def _reader(self, route: str | None, task: str | None) -> Reader:
        module = self.model[0] if self._router is None else self._router.sub_modules[route][0]
        # Shared where it can be: rows of one reader share their forward.
        key = id(module), getattr(module, f"{task}_length", None)
        if key not in self._readers:
            self._readers[key] = self._settled(reader_of(module, self._spec.max_length, task), route)
        return self._readers[key]

    def _settled(self, reader: Reader, route: str | None) -> Reader:
        """`reader`, with the limit that the model proves to have. Raises ModelUnavailable."""
        wish = Wish(Way(reader, route, 0), "", 0, "none", EmbedOptions())
        # Of the special tokens alone if the vocabulary has no "a".
        short = {name: list(values) or [0] for name, values in reader.read(["a"])[0].items()}

        def forward(tokens: int) -> torch.Tensor:
            with torch.inference_mode():
                return self._padded([Text(tokens, stretched_row(short, tokens), wish=wish)], "right")

        limit = settled(reader.limit, forward, self._spec.max_length)
        reader.limit = limit.tokens
        self._limits[reader] = limit
        return reader

    # -- the main thread's side --------------------------------------------------------------------------------------

    def foresee(self, upcoming: Upcoming) -> None:
        self._prefetch.foresee(lambda: self._of_one_forward(upcoming()))

    def _of_one_forward(self, rows: Sequence[Prepared]) -> Sequence[Prepared]:
        """The rows, but none if they take more than one forward."""
        return rows if len(self._groups(cast(Sequence[Text], rows))) == 1 else ()

    @property
    def packs(self) -> bool:
        """Whether texts of different lengths run together without padding."""
        return self._packing is not None

    def run(self, rows: Sequence[Prepared]) -> Vectors:
        """The vectors that the model's own call gives for each row's text alone, float32 [rows, dim], in order.

        One forward, but for rows that may not share one.
        """
        texts = cast(Sequence[Text], rows)
        with torch.inference_mode():
            vectors = in_groups(self._groups(texts), lambda places: self._vectors([texts[at] for at in places]))
            self._prefetch.launched()
            vectors = vectors[:, : self.own_cut].to(torch.float32)
            return cast(Vectors, vectors.cpu().numpy().astype(np.float32, copy=False))

    def _groups(self, texts: Sequence[Text]) -> list[list[int]]:
        """Places of texts that run together."""
        return grouped(
            (text.wish.way, self._sharing[text.wish.way.route].key(at, text.tokens)) for at, text in enumerate(texts)
        )

    def _vectors(self, texts: Sequence[Text]) -> torch.Tensor:
        """The model's output for texts that may share a forward."""
        # One text has nothing to pad.
        if self._packing and len(texts) > 1:
            return self._packing.run([cast(Features, text.features) for text in texts])
        return self._forward(texts, self._prefetch.batch(texts))

    def _padded(self, texts: Sequence[Text], side: Side) -> torch.Tensor:
        return self._forward(texts, sent(_batch(texts, side), self.model.device))

    def _forward(self, texts: Sequence[Text], features: dict[str, Any]) -> torch.Tensor:
        way = texts[0].wish.way
        if way.unpooled:
            features["prompt_length"] = way.unpooled
        routed = {} if way.route is None else {"task": way.route}
        return cast(torch.Tensor, self.model(features, **self._always, **routed)["sentence_embedding"])

    def _tensors(self, rows: Sequence[Prepared]) -> Mapping[str, torch.Tensor]:
        texts = cast(Sequence[Text], rows)
        return _batch(texts, self._sharing[texts[0].wish.way.route].side)


def _batch(texts: Sequence[Text], side: Side) -> Mapping[str, torch.Tensor]:
    return texts[0].wish.way.reader.batch([cast(Features, text.features) for text in texts], side)


def _row(text: str, tokens: Features, wish: Wish) -> Prepared | MillstreamError:
    reader, count = wish.way.reader, len(tokens["input_ids"])
    if count == 0 and not reader.reads_empty:
        return InvalidRequest("the model's tokenizer makes no token of the text", hint="give it a word")
    if count <= reader.limit:
        return Text(max(1, count), tokens, wish=wish)
    if wish.prompt_tokens >= reader.limit:
        return InputTooLong(
            f"the prompt alone has {wish.prompt_tokens} tokens, the model reads {reader.limit}", hint="shorten it"
        )
    if wish.truncate in ("start", "end"):
        cut = reader.cut(text, tokens, wish.truncate, wish.prompt_tokens)
        return Text(len(cut["input_ids"]), cut, truncated=True, wish=wish)
    return InputTooLong(f"{count} tokens, the model reads {reader.limit}", hint='shorten it, or pass truncate="end"')


def _router(model: Loaded) -> Any:
    """The first module where it sends texts of different types different ways. Raises ModelUnavailable."""
    router = cast(Any, model[0])
    if not hasattr(router, "sub_modules"):
        return None
    if getattr(router, "route_mappings", None):
        raise ModelUnavailable(
            "the model chooses a way by modality", hint="models that choose by query and document alone run"
        )
    if router.default_route is None and "text" not in router.sub_modules:
        raise ModelUnavailable("the model has no way for a text of no type", hint="give its router a default_route")
    return router
