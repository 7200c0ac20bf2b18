"""Standard streams as a caller may leave them: closed, on a full disk, or in an encoding that lacks a character."""

from __future__ import annotations

import errno
import io
import os
import sys

from millstream.broker.contract.errors import MillstreamError

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}


def open_closed_streams() -> None:
    """Put /dev/null in the place of each standard stream that is closed.

    A closed descriptor would go to the next file or socket that is opened, and worker processes, which inherit it,
    would write there. A character that an encoding lacks is written as an escape.
    """
    for descriptor, (name, mode) in enumerate(_MODES.items()):
        if not _is_open(descriptor):
            # The lowest free descriptor is this one: those below are open by now.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - open for the process's life
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def unwritable(error: Exception) -> MillstreamError | None:
    """The error of a standard output that takes nothing more; None if `error` is another one.

    A file that somebody opened has its name in the error.
    """
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in _WRITE_ERRORS:
        return None
    # The interpreter would try again as it ends, and print a traceback.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open for the process's life
    return MillstreamError(f"standard output cannot be written: {error.strerror}", hint="see where it is redirected to")


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
