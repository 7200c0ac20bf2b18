"""Processes that claim jobs in batches, run the model and settle the answers. `serve` does so in any program."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["serve"]

if TYPE_CHECKING:
    from millstream.worker.serving import serve
else:

    def __getattr__(name: str) -> object:
        # Imported on first use: a worker process runs a module of this package with -m, which must not be imported yet.
        if name == "serve":
            from millstream.worker.serving import serve

            return serve
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
