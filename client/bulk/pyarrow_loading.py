"""Loading of pyarrow, an extra that only Parquet needs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from millstream.broker.contract.errors import InvalidRequest
from millstream.client.bulk.files import reading


def load_pyarrow() -> tuple[Any, Any]:
    """Returns the modules pyarrow and pyarrow.parquet. Raises InvalidRequest if they are not installed."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InvalidRequest(
            f"Parquet needs pyarrow, which cannot be imported: {error}"[:300],
            hint='pip install "millstream[bulk]"',
        ) from error


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turns an OSError or an error of pyarrow into InvalidRequest that names `path`."""
    arrow, _ = load_pyarrow()
    try:
        with reading(path):
            yield
    except arrow.ArrowException as error:
        raise InvalidRequest(f"{path} cannot be read as Parquet: {error}"[:500]) from error
