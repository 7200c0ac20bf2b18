"""Waking an event loop from other threads: many calls, one wake-up."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress


class Mailbox:
    """What other threads want done in one event loop. A loop that is awake anyway is not woken again for each."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Weak: it is found by its loop, and must not keep it.
        self._loop = weakref.ref(loop)
        self._posted: deque[Callable[[], object]] = deque()
        self._waking = False

    def post(self, action: Callable[[], object]) -> None:
        """Have `action` called in the loop, soon and in order; never where the loop is closed. From any thread."""
        self._posted.append(action)
        if not self._waking and (loop := self._loop()):
            self._waking = True
            # The loop may be closed by the time an abandoned call is answered.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        # First: what is posted from now on, and not seen below, wakes the loop again.
        self._waking = False
        while self._posted:
            self._posted.popleft()()


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = weakref.WeakKeyDictionary()


def mailbox() -> Mailbox:
    """The mailbox of the running event loop."""
    loop = asyncio.get_running_loop()
    found = _mailboxes.get(loop)
    if found is None:
        found = _mailboxes[loop] = Mailbox(loop)
    return found
