"""The drift check of `millstream doctor`: whether embedding services still give the vectors that they gave."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.operations import EMBED
from millstream.broker.queue.diagnosis import Finding
from millstream.broker.queue.drift import TEXTS, diagnose_drift, keep, read_baseline
from millstream.broker.transport.connection import translated
from millstream.client.call_options import CallOptions
from millstream.client.calls import Calls
from millstream.client.result import Embeddings
from millstream.client.version_choice import Chosen

TIMEOUT_S = 30.0
"""Seconds that a service has to embed the fixed texts."""


def check_drift(url: str, prefix: str, specs: Sequence[ServiceSpec], *, accept: bool) -> list[Finding]:
    """Returns what has changed in the vectors of the embedding services among `specs`.

    The vectors of a service that is checked for the first time are kept, and with `accept` those of all. Raises
    BrokerUnavailable.
    """
    calls = Calls(url, prefix)
    try:
        embedding = [spec for spec in specs if spec.model.operation.results == "vectors"]
        return [finding for spec in embedding for finding in _check(calls, spec, accept)]
    finally:
        calls.close()


def _check(calls: Calls, spec: ServiceSpec, accept: bool) -> Iterator[Finding]:
    try:
        if not calls.services.live_workers(spec.name):
            what = "no worker lives: its vectors are not checked"
            yield Finding("note", spec.name, "drift_unknown", what, "start one, then check again")
            return
        vectors = _embed(calls, spec)
    except MillstreamError as error:
        what = f"its vectors cannot be checked: {error.message}"
        yield Finding("warning", spec.name, "drift_unknown", what, error.hint or "try again")
        return
    if vectors is None:
        return
    client, keys, fingerprint = calls.connection.client, calls.registry.keys(spec.name), vectors.fingerprint
    with translated(calls.connection.safe_url):
        baseline = read_baseline(client, keys)
        if baseline is None or accept:
            keep(client, keys, np.asarray(vectors), fingerprint)
            what = "its vectors of fixed texts are kept: the next check compares with them"
            yield Finding("note", spec.name, "drift_kept", what, "nothing to do")
        elif finding := diagnose_drift(spec.name, baseline, np.asarray(vectors), fingerprint):
            yield finding


def _embed(calls: Calls, spec: ServiceSpec) -> Embeddings | None:
    """Returns the vectors of the fixed texts, None if they are sparse. The cache is not read: it may be older."""
    began = time.monotonic()
    opts = CallOptions(op=EMBED.op, timeout=TIMEOUT_S).validate()
    calls.services.read(spec.name, opts.until(began))
    found = calls.begin(Chosen(spec), list(TEXTS), opts, began=began).finish()
    return found if isinstance(found, Embeddings) else None
