"""Files that decide who may do what: they are read only if no other user of this host can change them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from millstream.broker.contract.errors import ConfigError

MOST_BYTES = 1_048_576
"""Bytes that are read at most."""


def read_private_file(file: Path, kind: str, hint: str) -> str:
    """Returns the text of `file`, a `kind` of file such as "password file".

    Raises ConfigError if it cannot be read, is too large, or others may change it.
    """
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            found = stream.read(MOST_BYTES + 1)
            text = found.decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"the {kind} {file} cannot be read: {reason}", hint=hint) from None
    if len(found) > MOST_BYTES:
        raise ConfigError(f"the {kind} {file} has more than {MOST_BYTES} bytes", hint=hint)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"the {kind} {file} can be changed by other users", hint=f"chmod go-w {file}")
    return text
