"""Waits in an event loop: for a call, for an answer of the server, for the acceptance of a detached call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

from millstream.client.asker import Question
from millstream.client.channel.loop_calls import Changed, listener
from millstream.client.detached import Detached
from millstream.client.detached_request import PendingDetached
from millstream.client.handle import Handle

T = TypeVar("T")


async def wait_for_one(handles: Sequence[Handle], until: float | None = None) -> int | None:
    """Waits for a complete call and returns its index in `handles`; None if `until` (monotonic seconds) comes first."""
    changed = Changed()
    wake = listener(changed.set)
    try:
        for handle in handles:
            handle.listen(wake)
        while True:
            for place, handle in enumerate(handles):
                if handle.ready:
                    return place
            now = time.monotonic()
            if until is not None and now >= until:
                return None
            for handle in handles:
                handle.expire()
            ends = [end for handle in handles if (end := handle.expires_at) is not None]
            moments = ends if until is None else [*ends, until]
            await changed.wait(max(0.0, min(moments) - now) if moments else None)
    finally:
        for handle in handles:
            handle.unlisten(wake)


async def await_acceptance(pending: PendingDetached) -> Detached:
    """Does as PendingDetached.wait."""
    changed, acceptance = Changed(), pending.acceptance
    acceptance.listen(listener(changed.set))
    try:
        while not acceptance.over:
            await changed.wait(max(0.0, acceptance.ends_at - time.monotonic()))
        # The acceptance is over, so this does not block.
        return pending.wait()
    except BaseException:
        pending.give_up()
        raise


async def await_answer(question: Question[T], until: float | None) -> T:
    """Does as Question.wait, then Question.answer."""
    changed = Changed()
    wake = listener(changed.set)
    question.future.add_done_callback(lambda future: wake())
    await changed.wait(question.wait_s(until))
    return question.answer()
