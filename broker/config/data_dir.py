"""The folder in which a local server of this user keeps its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from millstream.broker.config.load import Config
from millstream.broker.config.variables import DATA_DIR_VARIABLE


def find_data_dir(flag: Path | None, config: Config | None, environ: Mapping[str, str]) -> Path:
    """Returns the first that is set: the flag, MILLSTREAM_DATA_DIR, `redis.data_dir`, the default folder."""
    if flag:
        return flag
    if config and config.redis.data_dir and not environ.get(DATA_DIR_VARIABLE):
        return config.redis.data_dir
    return default_data_dir(environ)


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """Returns MILLSTREAM_DATA_DIR if it is set, otherwise $XDG_DATA_HOME/millstream (~/.local/share/millstream)."""
    if chosen := environ.get(DATA_DIR_VARIABLE):
        return Path(chosen).expanduser()
    home = environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(home).expanduser() / "millstream"
