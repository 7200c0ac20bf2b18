"""Computes a model's answer to fixed texts, by which workers with one fingerprint check that they compute the same.

A fingerprint identifies the files of a model. It cannot show that a library loads them differently, that random weights
replace them, or that a device computes wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from millstream.broker.contract.answer import Answer
from millstream.broker.contract.errors import MillstreamError, ModelUnavailable, described
from millstream.broker.contract.operations import Agreement
from millstream.worker.models.base import Model


def answer_of(model: Model, agreement: Agreement) -> Answer:
    """Returns the answer of `model` to the texts of `agreement`, index -> number.

    Raises ModelUnavailable if it fails or is not finite.
    """
    rows = model.prepare(list(agreement.texts), agreement.options)
    for row in rows:
        if isinstance(row, MillstreamError):
            raise ModelUnavailable(f"the model refuses a plain text: {row}")
    try:
        results = model.forward(rows)  # type: ignore[arg-type]
    except Exception as error:
        raise ModelUnavailable(f"the model fails on a plain text: {described(error)}") from error
    return _flat(results)


def _flat(results: object) -> Answer:
    first = cast(Sequence[object], results)[0]
    if isinstance(first, MillstreamError):
        raise ModelUnavailable(f"the model fails on a plain text: {first}")
    if isinstance(first, Mapping):
        places, numbers = np.asarray(first["indices"], dtype=np.int64), np.asarray(first["values"], dtype=np.float64)
    else:
        numbers = np.asarray(results, dtype=np.float64).ravel()
        places = np.arange(len(numbers))
    if not np.isfinite(numbers).all():
        raise ModelUnavailable(
            "the model answers NaN or infinity to a plain text", hint="check its weights; try dtype: float32"
        )
    return dict(zip(places.tolist(), numbers.tolist(), strict=True))
