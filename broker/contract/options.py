"""Rules for the options of a call. Pure: clients and workers check options by the same rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, get_args

from millstream.broker.contract.errors import InvalidRequest

if TYPE_CHECKING:
    from millstream.broker.contract.job import Json

Rule = tuple[Callable[["Json"], bool], str]
"""Tells if a value is valid, and the requirement in words."""


def check_options(options: Mapping[str, Json], rules: Mapping[str, Rule], owner: str) -> None:
    """Raises InvalidRequest if a name has no rule, or if a value other than None breaks its rule.

    `owner` names the services that have these options, as in "a reranker".
    """
    for name, value in options.items():
        if name not in rules:
            raise InvalidRequest(f"no option {name!r}", hint=f"{owner} has {', '.join(rules)}")
        valid, requirement = rules[name]
        if value is not None and not valid(value):
            raise InvalidRequest(f"{name}={str(value)[:80]!r}", hint=requirement)


def one_of(choices: object) -> Rule:
    """Returns the rule that a value is one of the strings of a Literal."""
    names = get_args(choices)
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"
