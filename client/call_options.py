"""Options of a call: their defaults and checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast, get_args

from millstream.broker.config.spec import PriorityName, ServiceSpec
from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.embedding import Truncate
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json, Priority
from millstream.broker.contract.operations import BY_OP, Operation
from millstream.broker.contract.scalars import plain
from millstream.broker.contract.webhook_urls import WebhookUrl, is_allowed, read_webhook_url
from millstream.client.services import operation_of
from millstream.client.version_choice import Caller

_TENANT = re.compile(r"[A-Za-z0-9_.-]{0,64}")
_TRUNCATES: tuple[str, ...] = get_args(Truncate)
_PRIORITIES = frozenset(map(str, Priority))


class CallOptions(NamedTuple):
    """Options of a call. `timeout` is in seconds, for the whole call; `options` go to the model.

    `op` is the operation that the service must run; if it is empty, the service's own operation runs. `webhook` is the
    URL that is told when a detached call is done; None: none. `version` is the version of the route that must answer,
    by default the route's choice; `sticky_key` names the caller of a route that keeps a version for each key.
    """

    priority: PriorityName = "normal"
    timeout: float | None = None
    wait: bool = True
    tenant: str = ""
    options: Mapping[str, Json] = MappingProxyType({})
    op: str = ""
    webhook: str | None = None
    version: str = ""
    sticky_key: str = ""

    @property
    def caller(self) -> Caller:
        """The caller, as a route sees it."""
        return Caller(self.tenant, self.sticky_key, self.version)

    def until(self, began: float) -> float | None:
        """Returns when the timeout of a call that began at `began` is over; both in monotonic seconds."""
        return None if self.timeout is None else began + self.timeout

    def validate(self) -> CallOptions:
        """Returns a valid copy, with Python values instead of NumPy's. Raises InvalidRequest if a value is wrong."""
        opts = self if _is_plain(self) else self._convert()
        opts._check()
        return opts

    def _convert(self) -> CallOptions:
        given = [plain(value) for value in self]
        options = {name: cast(Json, plain(value)) for name, value in self.options.items()}
        return CallOptions(*cast(tuple[Any, ...], given))._replace(options=options)

    def _check(self) -> None:
        if not isinstance(self.priority, str) or self.priority not in _PRIORITIES:
            raise InvalidRequest(f"no priority {self.priority!r}", hint=f"one of {', '.join(Priority)}")
        if self.timeout is not None and not (_is_number(self.timeout) and self.timeout > 0):
            raise InvalidRequest(f"timeout={self.timeout!r} is not a number of seconds above 0")
        if not (isinstance(self.tenant, str) and _TENANT.fullmatch(self.tenant)):
            raise InvalidRequest(f"tenant={self.tenant!r} is not valid", hint="at most 64 of A-Z a-z 0-9 _ . -")
        if not (isinstance(self.version, str) and isinstance(self.sticky_key, str)):
            raise InvalidRequest("version= and sticky_key= must be strings", hint="leave them out for the default")
        if self.options:
            self._check_options()

    def _check_options(self) -> None:
        truncate = self.options.get("truncate", "none")
        if truncate not in _TRUNCATES:
            raise InvalidRequest(f"truncate={truncate!r} is not valid", hint=f"one of {', '.join(_TRUNCATES)}")
        try:
            encode_inputs([], self.options)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"options must be JSON values: {error}") from error


def read_webhook(text: str) -> WebhookUrl:
    """Returns the URL of a webhook. Raises InvalidRequest if it is invalid."""
    try:
        return read_webhook_url(str(text))
    except ValueError as error:
        raise InvalidRequest(f"the URL of the webhook {error}") from None


def check_webhook(spec: ServiceSpec, text: str) -> None:
    """Raises InvalidRequest if `spec` does not allow this URL of a webhook."""
    if not is_allowed(read_webhook(text), spec.webhooks):
        raise InvalidRequest(
            f"service {spec.name!r} does not allow this webhook",
            hint="add the start of its URL to webhooks.allow in config.yaml, and `millstream config push --replace`",
        )


_PLAIN_TYPES = frozenset({str, int, float, bool, type(None)})


def _is_plain(opts: CallOptions) -> bool:
    """Returns whether no value needs to be converted. A fast check, since every call runs it."""
    if opts.options and not _PLAIN_TYPES.issuperset(map(type, opts.options.values())):
        return False
    return type(opts.timeout) in _PLAIN_TYPES and type(opts.wait) in _PLAIN_TYPES and type(opts.tenant) in _PLAIN_TYPES


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def find_operation(spec: ServiceSpec, op: str) -> Operation:
    """Returns the operation of a call's jobs. `op` is the one that the call asks for; empty for any.

    Raises InvalidRequest if the service cannot run it.
    """
    operation = operation_of(spec)
    if op and op != operation.op:
        # A user's own code may answer vectors, so `embed` may call it; a model for tests may stream texts.
        asked = BY_OP[op]
        may_answer = asked.results in ("vectors", "generations") and asked.streams == operation.streams
        if not (operation.results == "any" and may_answer):
            raise InvalidRequest(f"service {spec.name!r} is of type {spec.model.type!r}", hint=f"it cannot {op}")
    return operation
