"""Groups of a shard's rows that may travel together: those of one operation with equal options."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.client.bulk.items import Row, RowCall
from millstream.client.call_options import CallOptions, find_operation
from millstream.client.calls import Calls
from millstream.client.rows import encode_rows, measure_rows


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are sent with `opts`. `sizes` has the UTF-8 bytes of each, by its index."""

    opts: CallOptions
    sizes: Mapping[int, int]


def group_rows(
    calls: Calls, spec: ServiceSpec, opts: CallOptions, rows: Sequence[Row]
) -> tuple[list[RowGroup], dict[int, MillstreamError]]:
    """Returns the groups of `rows`, and the errors of those that cannot be sent, by index.

    `opts` are those of the run. Groups come in the order of their first rows: the same rows give the same groups.
    """
    errors: dict[int, MillstreamError] = {}
    members: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        if isinstance(row.value, MillstreamError):
            errors[at] = row.value
        else:
            members.setdefault(_key_of(row.call), []).append(at)
    groups = list[RowGroup]()
    for indexes in members.values():
        own = _opts_of(rows[indexes[0]].call, opts)
        sizes, refused = _measure(calls, spec, own, rows, indexes)
        errors |= refused
        if sizes:
            groups.append(RowGroup(own, sizes))
    return groups, errors


def _key_of(call: RowCall | None) -> str:
    return "" if call is None else json.dumps([call.op, call.options], sort_keys=True)


def _opts_of(call: RowCall | None, opts: CallOptions) -> CallOptions:
    return opts if call is None else opts._replace(op=call.op, options=call.options)


def _measure(
    calls: Calls, spec: ServiceSpec, opts: CallOptions, rows: Sequence[Row], indexes: Sequence[int]
) -> tuple[dict[int, int], dict[int, MillstreamError]]:
    """Returns the sizes of the rows at `indexes` that can be sent, and the errors of the others."""
    try:
        opts = opts.validate()
        operation, beside = find_operation(spec, opts.op), calls.check_options(spec, opts.options)
    except InvalidRequest as error:
        return {}, dict.fromkeys(indexes, error)
    values: list[Json] = [rows[at].value for at in indexes]  # type: ignore[misc]
    sizes, refused = measure_rows(encode_rows(operation, values), beside)
    return (
        {indexes[at]: size for at, size in sizes.items()},
        {indexes[at]: error for at, error in refused.items()},
    )
