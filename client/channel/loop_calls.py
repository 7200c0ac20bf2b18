"""Waking an event loop from other threads: many calls, one wake-up."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

T = TypeVar("T")


class Mailbox:
    """Actions that other threads want done in one event loop. A loop that is awake is not woken again for each.

    Once the loop is closed, it keeps nothing that was posted.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Weak: it is found by its loop, and must not keep it.
        self._loop = weakref.ref(loop)
        self._posted: deque[Callable[[], object]] = deque()
        self._waking = False

    def post(self, action: Callable[[], object]) -> bool:
        """Have `action` called in the loop, soon and in order; False if the loop is closed. From any thread."""
        self._posted.append(action)
        loop = self._loop()
        # A loop that is closed before it wakes up never empties this.
        if loop is None or loop.is_closed() or not self._wake(loop):
            self._posted.clear()
            return False
        return True

    def _wake(self, loop: asyncio.AbstractEventLoop) -> bool:
        if not self._waking:
            self._waking = True
            try:
                loop.call_soon_threadsafe(self._empty)
            except RuntimeError:
                # It was closed a moment ago.
                return False
        return True

    def _empty(self) -> None:
        # First: what is posted from now on, and not seen below, wakes the loop again.
        self._waking = False
        while self._posted:
            self._posted.popleft()()


class Listener:
    """Posts one action to a mailbox whenever it is called; lets go of both once the loop is closed."""

    def __init__(self, box: Mailbox, action: Callable[[], object]) -> None:
        self._target: tuple[Mailbox, Callable[[], object]] | None = (box, action)

    def __call__(self) -> None:
        if target := self._target:
            box, action = target
            if not box.post(action):
                self._target = None


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[Mailbox]] = weakref.WeakKeyDictionary()
"""Weak on both sides: a mailbox lives while somebody may post to it, since what was posted may hold the loop."""


def mailbox() -> Mailbox:
    """The mailbox of the running event loop."""
    loop = asyncio.get_running_loop()
    known = _mailboxes.get(loop)
    found = known() if known else None
    if found is None:
        found = Mailbox(loop)
        _mailboxes[loop] = weakref.ref(found)
    return found


def listener(action: Callable[[], object]) -> Listener:
    """Has `action` called in the running event loop, after each call of it from any thread."""
    return Listener(mailbox(), action)


async def arrival(ask: Callable[[Callable[[T], object]], object]) -> T:
    """What `ask` hands to the function that it is given, once and from any thread."""
    box, future = mailbox(), asyncio.get_running_loop().create_future()

    def arrive(value: T) -> None:
        if not future.done():
            future.set_result(value)

    ask(lambda value: box.post(partial(arrive, value)))
    return cast(T, await future)
