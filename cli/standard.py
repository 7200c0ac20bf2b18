"""Handles standard streams that are closed, on a full disk, or in an encoding that lacks a character."""

from __future__ import annotations

import errno
import io
import os
import sys

from millstream.broker.contract.errors import MillstreamError

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}


def open_closed_streams() -> None:
    """Opens /dev/null in the place of each closed standard stream. Writes characters that an encoding lacks as escapes.

    Otherwise the next file or socket that is opened would get the closed descriptor, and worker processes, which
    inherit it, would write their messages there.
    """
    for descriptor, (name, mode) in enumerate(_MODES.items()):
        if not _is_open(descriptor):
            # This opens `descriptor`: it is the lowest free one, because those below it are open.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - open for the process's life
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def unwritable(error: Exception) -> MillstreamError | None:
    """Returns our error if `error` means that standard output cannot be written, otherwise None.

    An OSError with a file name is about another file.
    """
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in _WRITE_ERRORS:
        return None
    # Otherwise the interpreter writes again at exit, and prints a traceback.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open for the process's life
    return MillstreamError(
        f"standard output cannot be written: {error.strerror}", hint="check the file or pipe that it is redirected to"
    )


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
