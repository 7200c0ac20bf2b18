"""Fake model: answers a text with a vector made from its hash, or as a test says. Pure."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from millstream.broker.contract.codec import decode_inputs, decode_reply, encode_reply, encode_value
from millstream.broker.contract.embedding import EmbedOptions
from millstream.broker.contract.errors import InvalidRequest, Malformed, MillstreamError, ModelFailed, described
from millstream.broker.contract.generation import GenerateOptions, Generation, Usage
from millstream.broker.contract.job import Draft, Json, Reply, Vectors
from millstream.broker.contract.operations import BY_OP, STREAMING_OPS
from millstream.broker.contract.partial import Delta, encode_delta
from millstream.broker.contract.prompt import Prompt
from millstream.broker.contract.vectors import shaped
from millstream.client.row_results import RowOutcome

FAKE_VERSION = "fake"
"""Version of the results of a fake language model."""

_WORDS = re.compile(r"\S+\s*|\s+")

Answers = Callable[[str], RowOutcome]
"""Function from a text to its outcome: a vector [dim], a JSON value such as a score, or an error (may be raised)."""

Handler = Callable[[list[Any]], Sequence[Any]]
"""Function of a custom service, as a worker runs it; here it gets one payload at a time."""


def fake_vector(text: str, dim: int) -> Vectors:
    """Returns a unit vector, float32 [dim], that depends only on the text: equal on every machine."""
    digest = hashlib.shake_256(text.encode()).digest(4 * dim)
    vector = np.frombuffer(digest, dtype="<u4").astype(np.float64) / 2**31 - 1.0
    return cast(Vectors, (vector / np.linalg.norm(vector)).astype(np.float32))


def fake_score(query: str, document: str) -> float:
    """Returns the share of the query's words, between 0 and 1, that are in the document."""
    words = set(query.lower().split())
    return len(words & set(document.lower().split())) / max(1, len(words))


def read_embed_options(options: Mapping[str, Json]) -> EmbedOptions:
    """Returns the options that an embedding service has. Others are ignored, since the service has no declared type."""
    return EmbedOptions.read({name: value for name, value in options.items() if name in EmbedOptions._fields})


class FakeModel:
    """Model that replies to jobs as a worker would. Arguments are those of FakeClient."""

    def __init__(
        self,
        dim: int,
        answers: Answers | None,
        errors: Mapping[str, MillstreamError],
        handlers: Mapping[str, Handler],
    ) -> None:
        self._dim = dim
        self._answers = answers
        self._errors = errors
        self.handlers = handlers
        self.answered: dict[str, Counter[str]] = {}
        """Jobs, rows without an error ("ok") and rows with one (its code) that were answered so far, by service."""

    def reply(self, service: str, draft: Draft) -> bytes:
        """Returns the encoded reply to one job, as a worker would send it."""
        inputs, options = decode_inputs(draft.body, draft.rows)
        query = str(options["query"]) if BY_OP[draft.op].results == "scores" else None
        if handler := self.handlers.get(service):
            outcomes = [_handle(handler, payload) for payload in inputs]
        else:
            outcomes = [self._outcome(_text_of(row), draft.op, query) for row in inputs]
        if draft.op in STREAMING_OPS:
            outcomes = [
                _generation(_text_of(row), each, draft.op, options) if isinstance(each, str) else each
                for row, each in zip(inputs, outcomes, strict=True)
            ]
        errors = {row: each for row, each in enumerate(outcomes) if isinstance(each, MillstreamError)}
        good = [each for each in outcomes if not isinstance(each, MillstreamError)]
        count = self.answered.setdefault(service, Counter())
        count.update({"jobs": 1, "ok": len(good)})
        count.update(each.code for each in errors.values())
        tokens = sum(len(str(text).split()) + 2 for row, text in enumerate(inputs) if row not in errors)
        if good and all(isinstance(each, np.ndarray) for each in good):
            embed_options = read_embed_options(options)
            whole = np.stack(cast(list[Vectors], good))
            vectors = shaped(whole, embed_options.dimensions, embed_options.unit(True), embed_options.encoding)
            return encode_reply(Reply(vectors=vectors, errors=errors, tokens=tokens))
        fingerprint = FAKE_VERSION if BY_OP[draft.op].results == "generations" else ""
        return encode_reply(Reply(values=cast(list[Json], good), errors=errors, tokens=tokens, fingerprint=fingerprint))

    def _outcome(self, text: str, op: str, query: str | None) -> RowOutcome:
        try:
            if text in self._errors:
                return self._errors[text]
            if self._answers:
                return self._answers(text)
        except MillstreamError as error:
            return error
        if op in STREAMING_OPS:
            return text
        return fake_vector(text, self._dim) if query is None else fake_score(query, text)


def _text_of(row: Json) -> str:
    """Returns the text of a row: of a conversation the last message's, of token ids the ids."""
    if not isinstance(row, dict):
        return str(row)
    try:
        prompt = Prompt.read(row)
    except InvalidRequest:
        return str(row)
    if prompt.messages:
        content = prompt.messages[-1].get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
    return " ".join(map(str, prompt.token_ids or ()))


def _generation(prompt: str, text: str, op: str, options: Mapping[str, Json]) -> Json:
    """Returns the result of a row: `text` cut to max_tokens words. Each word counts as a token."""
    if BY_OP[op].results != "generations":
        return Generation(text, "stop").json()
    words = _WORDS.findall(text)
    most = GenerateOptions.read(options).max_tokens or len(words)
    seed = options.get("seed")
    usage = Usage(len(_WORDS.findall(prompt)), min(most, len(words)))
    return Generation(
        "".join(words[:most]), "length" if len(words) > most else "stop", usage, seed if isinstance(seed, int) else 0
    ).json()


def fake_deltas(reply: bytes) -> list[bytes]:
    """Returns a delta for each word of a generated text."""
    values = decode_reply(reply).values
    try:
        text = Generation.read(values[0] if values else None).text
    except Malformed:
        return []
    return [encode_delta(Delta(word.start(), word[0])) for word in _WORDS.finditer(text)]


def _handle(handler: Handler, payload: Json) -> RowOutcome:
    """Returns the outcome of one payload: what `handler` returns, or its error."""
    try:
        (result,) = handler([payload])
        if not isinstance(result, np.ndarray):
            encode_value(result)
    except MillstreamError as error:
        return error
    except KeyboardInterrupt:
        # A worker would answer an error, but Ctrl-C must end the test's process.
        raise
    except BaseException as error:  # noqa: BLE001 - a worker answers every error of a handler, too
        return ModelFailed(described(error))
    return cast(RowOutcome, result)
