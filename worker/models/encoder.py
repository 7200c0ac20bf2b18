"""Texts to the raw output of a sentence-transformers model, dense or sparse: read once, run a micro-batch at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from millstream.broker.config import ModelSpec
from millstream.broker.embedding import EmbedOptions, InputType
from millstream.broker.errors import InputTooLong, InvalidRequest, MillstreamError, ModelUnavailable
from millstream.broker.job import Json, Vectors
from millstream.worker.models.base import Limit, Prepared, Upcoming
from millstream.worker.models.feed import Feed
from millstream.worker.models.limits import settled, stretched
from millstream.worker.models.loading import Folder, Loaded, dtype_of, load
from millstream.worker.models.packing import Packing
from millstream.worker.models.source import locate
from millstream.worker.models.tokens import Ids, Reader, reader_of, text_of

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
    """A row; its features are token ids."""

    wish: Wish


class Encoder:
    """One model on one device. What it gives for a text does not depend on the texts beside it."""

    def __init__(self, spec: ModelSpec, device: str | None, threads: int, truncate: str) -> None:
        torch.set_num_threads(threads)
        self._source = locate(spec.model_name)
        self._spec = spec
        self._truncate = truncate
        self.model = load(self._source, spec, device)
        self._router = _router(self.model)
        self._readers: dict[tuple[int, int | None], Reader] = {}
        self._limits: dict[Reader, Limit] = {}
        self._pools_prompt = all(getattr(module, "include_prompt", True) for module in self.model.modules())
        most_active = getattr(self.model, "max_active_dims", None)
        self._always: dict[str, Any] = {} if most_active is None else {"max_active_dims": most_active}
        self._feed = Feed(self.model.device, _tensors, spec.backend)
        self._packing = Packing.of(self.model) if spec.backend == "torch" and self._pools_prompt else None
        self.plain = self._wish(EmbedOptions())
        # All of them now: a reader's limit is run, which the claimer's thread must not do.
        for task in ("query", "document"):
            if self._router is None or task in self._router.sub_modules:
                self._reader(self._route(task), task)

    @property
    def device_type(self) -> str:
        """The kind of device that runs forwards."""
        return str(self.model.device.type)

    @property
    def limit(self) -> Limit:
        """That of a text without options."""
        return self._limits[self.plain.way.reader]

    def fingerprint(self, size: str) -> str:
        """Names the weights, the other files that make vectors, the dtype and `size`, the dimension."""
        return Folder(self._source, self._spec.revision).fingerprint(self._spec, dtype_of(self.model), size)

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
        for (at, text), ids in zip(texts, wish.way.reader.read([text for _, text in texts]), strict=True):
            rows[at] = _row(text, ids, wish)
        return rows

    def samples(self, tokens: int) -> Sequence[Json]:
        wish = self.plain
        reader = wish.way.reader
        return [text_of(min(tokens, reader.limit), lambda text: len(reader.read([wish.prompt + text])[0]))]

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
        ids = reader.read(["a"])[0] or [0]
        limit = settled(
            reader.limit,
            lambda tokens: self.run([Text(tokens, stretched(ids, tokens), wish=wish)]),
            self._spec.max_length,
        )
        reader.limit = limit.tokens
        self._limits[reader] = limit
        return reader

    # -- the main thread's side --------------------------------------------------------------------------------------

    def foresee(self, upcoming: Upcoming) -> None:
        self._feed.foresee(lambda: _of_one_way(upcoming()))

    @property
    def packs(self) -> bool:
        """Whether texts of different lengths run together without padding."""
        return self._packing is not None

    def run(self, rows: Sequence[Prepared]) -> Vectors:
        """The model's output, float32 [rows, dim], in order. One forward, but for rows that go different ways."""
        texts = cast(Sequence[Text], rows)
        ways = list({wish.way for wish in {text.wish for text in texts}})
        if len(ways) == 1:
            return self._forward(texts, ways[0])
        places = [[at for at, text in enumerate(texts) if text.wish.way == way] for way in ways]
        parts = [self._forward([texts[at] for at in some], way) for some, way in zip(places, ways, strict=True)]
        return np.concatenate(parts)[np.argsort(np.concatenate(places))]

    def _forward(self, texts: Sequence[Text], way: Way) -> Vectors:
        with torch.inference_mode():
            vectors = self._vectors(texts, way)
            self._feed.launched()
            return cast(Vectors, vectors.to(torch.float32).cpu().numpy().astype(np.float32, copy=False))

    def _vectors(self, texts: Sequence[Text], way: Way) -> torch.Tensor:
        # One text has nothing to pad.
        if self._packing and len(texts) > 1:
            return self._packing.run(cast(list[Ids], [text.features for text in texts]))
        features = self._feed.batch(texts)
        if way.unpooled:
            features["prompt_length"] = way.unpooled
        routed = {} if way.route is None else {"task": way.route}
        return cast(torch.Tensor, self.model(features, **self._always, **routed)["sentence_embedding"])


def _of_one_way(rows: Sequence[Prepared]) -> Sequence[Prepared]:
    """The rows, but none where they take more than one forward."""
    return rows if len({text.wish.way for text in cast(Sequence[Text], rows)}) == 1 else ()


def _tensors(rows: Sequence[Prepared]) -> Mapping[str, torch.Tensor]:
    texts = cast(Sequence[Text], rows)
    return texts[0].wish.way.reader.batch(cast(list[Ids], [text.features for text in texts]))


def _row(text: str, ids: Ids, wish: Wish) -> Prepared | MillstreamError:
    reader = wish.way.reader
    if len(ids) <= reader.limit:
        return Text(max(1, len(ids)), ids, wish=wish)
    if wish.prompt_tokens >= reader.limit:
        return InputTooLong(
            f"the prompt alone has {wish.prompt_tokens} tokens, the model reads {reader.limit}", hint="shorten it"
        )
    if wish.truncate in ("start", "end"):
        cut = reader.cut(text, ids, wish.truncate, wish.prompt_tokens)
        return Text(len(cut), cut, truncated=True, wish=wish)
    return InputTooLong(f"{len(ids)} tokens, the model reads {reader.limit}", hint='shorten it, or pass truncate="end"')


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
