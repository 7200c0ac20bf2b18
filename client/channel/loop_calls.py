"""Calls into an event loop from other threads: many calls, one wake-up of the loop."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

T = TypeVar("T")


class Mailbox:
    """Queue of actions that other threads run in one event loop. A loop that is awake is not woken again.

    If the loop is closed, posted actions are dropped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # A weak reference: the mailbox must not keep its loop alive.
        self._loop = weakref.ref(loop)
        self._posted: deque[Callable[[], object]] = deque()
        self._waking = False

    def post(self, action: Callable[[], object]) -> bool:
        """Calls `action` in the loop, soon and in order; returns False if the loop is closed. From any thread."""
        self._posted.append(action)
        loop = self._loop()
        # A loop that is closed before it wakes up never empties the queue.
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
                # The loop was closed after the check in `post`.
                return False
        return True

    def _empty(self) -> None:
        # Before the actions run: an action that is posted after the last check below must wake the loop again.
        self._waking = False
        while self._posted:
            self._posted.popleft()()


class Listener:
    """Callable that posts one action to a mailbox. Drops its references to both once the loop is closed."""

    def __init__(self, box: Mailbox, action: Callable[[], object]) -> None:
        self._target: tuple[Mailbox, Callable[[], object]] | None = (box, action)

    def __call__(self) -> None:
        if target := self._target:
            box, action = target
            if not box.post(action):
                self._target = None


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[Mailbox]] = weakref.WeakKeyDictionary()
"""Mailbox of each event loop. Both references are weak: posted actions may hold the loop, so a mailbox only lives while
a listener can post to it."""


def mailbox() -> Mailbox:
    """Returns the mailbox of the running event loop."""
    loop = asyncio.get_running_loop()
    known = _mailboxes.get(loop)
    found = known() if known else None
    if found is None:
        found = Mailbox(loop)
        _mailboxes[loop] = weakref.ref(found)
    return found


def listener(action: Callable[[], object]) -> Listener:
    """Returns a callable for any thread: each call of it calls `action` in the running event loop."""
    return Listener(mailbox(), action)


async def arrival(ask: Callable[[Callable[[T], object]], object]) -> T:
    """Calls `ask` with a function and returns the value that this function gets, once and from any thread."""
    box, future = mailbox(), asyncio.get_running_loop().create_future()

    def arrive(value: T) -> None:
        if not future.done():
            future.set_result(value)

    ask(lambda value: box.post(partial(arrive, value)))
    return cast(T, await future)


class Changed:
    """Event for one waiting task, with a timeout. Costs half of asyncio.Event, and every awaited call uses one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Sets the event and wakes the task. Must be called in the loop."""
        self._set = True
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, timeout: float | None) -> None:
        """Waits for the event, at most `timeout` seconds; returns at once if it was set since the last wait."""
        if not self._set:
            self._waiter = self._loop.create_future()
            timer = None if timeout is None else self._loop.call_later(timeout, self.set)
            try:
                await self._waiter
            finally:
                if timer:
                    timer.cancel()
        self._set = False
