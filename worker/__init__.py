"""Processes that claim jobs in batches, run the model and settle the answers. `serve` makes one of a program's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["serve"]

if TYPE_CHECKING:
    from millstream.worker.serving import serve
else:

    def __getattr__(name: str) -> object:
        # Late: a worker process runs a module of this package as its program, which must not be imported before.
        if name == "serve":
            from millstream.worker.serving import serve

            return serve
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
