"""Options of a call to a reranker. Pure: clients validate them, workers apply them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from millstream.broker.contract.embedding import Truncate
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.options import Rule, check_options, one_of

if TYPE_CHECKING:
    from millstream.broker.contract.job import Json

Scores = Literal["sigmoid", "raw"]
"""Kinds of scores: the logit through a sigmoid, or the logit."""


class RerankOptions(NamedTuple):
    """The options of one call. None means the default of the service or the model.

    `scores` None gives scores through the model's own activation; `instruction` tells a language model its task.
    """

    query: str
    scores: Scores | None = None
    instruction: str | None = None
    truncate: Truncate | None = None

    @classmethod
    def read(cls, options: Mapping[str, Json]) -> RerankOptions:
        """Returns the options of a call's JSON.

        Raises InvalidRequest if there is no query, a name is unknown or a value is not valid.
        """
        query = options.get("query")
        check_options(options, _RULES, "a reranker")
        if not isinstance(query, str):
            given = "" if query is None else f", not {type(query).__name__}"
            raise InvalidRequest(f"rerank needs `query`, a string{given}", hint='query="..."')
        return cls(**cast(dict[str, str], options))  # type: ignore[arg-type]

    def json(self) -> dict[str, Json]:
        """Returns the options as `read` takes them, without those that are None."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @property
    def size(self) -> int:
        """UTF-8 bytes that the model reads beside each document."""
        return len(self.query.encode()) + len((self.instruction or "").encode())


_RULES: Mapping[str, Rule] = {
    # Its type is checked apart, since a query is required.
    "query": (lambda value: True, "a string"),
    "scores": one_of(Scores),
    "instruction": (lambda value: isinstance(value, str), "a string"),
    "truncate": one_of(Truncate),
}
