"""Packages of extras that a command needs."""

from __future__ import annotations

import importlib

from millstream.broker.contract.errors import ConfigError


def check_installed(extra: str, *packages: str) -> None:
    """Raises ConfigError if one of the packages of an extra cannot be imported."""
    try:
        for name in packages:
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"packages of this command are missing: {error}", hint=f'pip install "millstream[{extra}]"'
        ) from None
