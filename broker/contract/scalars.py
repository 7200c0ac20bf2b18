"""Scalars as programs with NumPy or tensors pass them: plain Python values are made of them."""

from __future__ import annotations

_PLAIN = (str, int, float, bool, type(None))


def plain(value: object) -> object:
    """The Python value that a scalar of an array library holds; everything else as it is.

    Scalars are those of NumPy and arrays or tensors without a dimension.
    """
    if type(value) in _PLAIN or getattr(value, "ndim", None) != 0:
        return value
    item = getattr(value, "item", None)
    return item() if callable(item) else value
