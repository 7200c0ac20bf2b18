"""Converts scalars of NumPy and of tensor libraries to plain Python values."""

from __future__ import annotations

_PLAIN = (str, int, float, bool, type(None))


def plain(value: object) -> object:
    """Returns the Python value of a scalar of an array library, and any other value unchanged.

    A scalar is a NumPy scalar, or an array or tensor without dimensions.
    """
    if type(value) in _PLAIN or getattr(value, "ndim", None) != 0:
        return value
    item = getattr(value, "item", None)
    return item() if callable(item) else value
