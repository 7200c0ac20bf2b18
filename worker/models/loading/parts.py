"""Reads which modules a model's folder has: only classes of sentence-transformers, with files inside the folder.

This check runs before the library reads the folder: some releases import any class that modules.json names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.util import import_from_string
from torch import nn

from millstream.worker.models.loading.files import below, read_json, read_settings, refusal

LIBRARY = "sentence_transformers."

_FIRST_LAYOUT = f"{LIBRARY}models."
"""Prefix of module names in folders of releases before 5.4. Some of these folders were written by hand."""


class Part(NamedTuple):
    """One module: its class, the folder of its files, and whether release 5.4 or later of the library wrote it."""

    kind: type[nn.Module]
    folder: Path
    current_layout: bool

    @property
    def is_transformer(self) -> bool:
        """Whether transformers loads the weights of this module."""
        return issubclass(self.kind, Transformer) or self.kind.__name__ == "CLIPModel"


def parts_of(folder: Path) -> list[Part]:
    """Returns the modules of a model in `folder`; one transformer without modules.json. Raises ModelUnavailable."""
    listing = folder / "modules.json"
    if not listing.is_file():
        return [Part(Transformer, folder, False)]
    modules = read_json(listing)
    if not isinstance(modules, list) or not modules:
        raise refusal(listing, "it lists no modules", "copy or download the folder again, whole")
    return [part for module in modules for part in _parts(folder, module, listing)]


def _parts(folder: Path, module: object, listing: Path) -> Iterator[Part]:
    if not isinstance(module, dict) or not {"type", "path"}.issubset(module):
        raise refusal(listing, f"a module without type or path: {module!r}", "copy or download the folder again, whole")
    part = _part(module["type"], below(folder, module["path"], listing), listing)
    yield part
    if issubclass(part.kind, Router):
        yield from _routes(part.folder)


def _routes(folder: Path) -> Iterator[Part]:
    """Yields the modules of a router. They are listed in router_config.json; until release 5.0, in config.json."""
    listing = next((file for file in (folder / "router_config.json", folder / "config.json") if file.is_file()), None)
    if listing is None:
        raise refusal(folder / "router_config.json", "it is missing", "copy or download the folder again, whole")
    types = read_settings(listing).get("types")
    if not isinstance(types, dict) or not types:
        raise refusal(listing, "it lists no modules", "copy or download the folder again, whole")
    for path, kind in types.items():
        yield _part(kind, below(folder, path, listing), listing)


def _part(name: object, folder: Path, listing: Path) -> Part:
    kind = _class(name, listing)
    return Part(kind, folder, not str(name).startswith(_FIRST_LAYOUT))


def _class(name: object, listing: Path) -> type[nn.Module]:
    """Returns the class `name`. Raises ModelUnavailable if it is no module that sentence-transformers defines."""
    kind: Any = None
    if isinstance(name, str) and name.startswith(LIBRARY):
        try:
            kind = import_from_string(name)
        except (ImportError, AttributeError, ValueError):
            kind = None
    if not isinstance(kind, type) or not issubclass(kind, nn.Module) or not kind.__module__.startswith(LIBRARY):
        raise refusal(
            listing,
            f"it names the module {name!r}, which is not one of sentence-transformers'",
            "a model's own code is never run; `pip install -U sentence-transformers` if a newer release has it",
        )
    return kind
