"""Many things told to an event loop by one wake-up."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial

from millstream.client.channel.loop_calls import Listener, Mailbox, listener, mailbox


class Loop(asyncio.SelectorEventLoop):
    """Counts its wake-ups from outside."""

    woken = 0

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object, **kwargs: object) -> asyncio.Handle:
        self.woken += 1
        return super().call_soon_threadsafe(callback, *args, **kwargs)  # type: ignore[arg-type]


def test_what_is_posted_while_the_loop_is_busy_costs_one_wake_up_and_keeps_its_order() -> None:
    loop, done = Loop(), list[int]()

    async def busy() -> None:
        box = mailbox()

        def post() -> None:
            for n in range(100):
                box.post(partial(done.append, n))

        poster = threading.Thread(target=post)
        poster.start()
        poster.join()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(busy())
        runner.run(asyncio.sleep(0))
        woken = loop.woken

    assert done == list(range(100))
    assert woken == 1


def test_a_loop_is_woken_again_for_what_comes_later() -> None:
    async def twice() -> None:
        box = mailbox()
        for _ in range(2):
            told = asyncio.Event()
            threading.Thread(target=box.post, args=(told.set,)).start()
            await asyncio.wait_for(told.wait(), 10.0)

    asyncio.run(twice())


def test_each_loop_has_one_mailbox() -> None:
    async def mine() -> tuple[Mailbox, Mailbox]:
        return mailbox(), mailbox()

    one, other = asyncio.run(mine())
    third, _ = asyncio.run(mine())

    assert one is other
    assert third is not one


class ActiveJob:
    """Something that what is posted holds."""

    def called(self) -> None: ...


def test_what_is_posted_to_a_closed_loop_is_not_kept() -> None:
    async def mine() -> Mailbox:
        return mailbox()

    box = asyncio.run(mine())
    held = [ActiveJob() for _ in range(3)]
    posted = [weakref.ref(each) for each in held]

    assert [box.post(each.called) for each in held] == [False] * 3
    held.clear()

    assert [each() for each in posted] == [None] * 3


def test_what_a_loop_did_not_do_before_it_was_closed_is_not_kept_beyond_the_next_post() -> None:
    loop = asyncio.new_event_loop()
    box, first, second = Mailbox(loop), ActiveJob(), ActiveJob()
    posted = [weakref.ref(first), weakref.ref(second)]

    assert box.post(first.called)
    loop.close()
    assert not box.post(second.called)
    del first, second

    assert [each() for each in posted] == [None, None]


def test_an_answer_that_comes_too_late_does_not_keep_the_closed_loop() -> None:
    loop = asyncio.new_event_loop()

    async def listen() -> Listener:
        return listener(asyncio.get_running_loop().time)

    told = loop.run_until_complete(listen())
    told()
    loop.close()
    told()
    closed = weakref.ref(loop)
    del loop
    gc.collect()

    assert closed() is None


def test_what_a_closed_loop_did_not_do_does_not_keep_it() -> None:
    loop = asyncio.new_event_loop()

    async def post() -> None:
        mailbox().post(asyncio.get_running_loop().time)
        asyncio.get_running_loop().stop()

    task = loop.create_task(post())
    loop.run_forever()
    loop.close()
    closed = weakref.ref(loop)
    del loop, task
    gc.collect()

    assert closed() is None


def test_a_mailbox_does_not_keep_its_loop() -> None:
    async def mine() -> weakref.ref[asyncio.AbstractEventLoop]:
        mailbox()
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(mine())
    gc.collect()

    assert loop() is None
