"""Threads are woken one after another, and one that is lost on the way holds nobody up for ever."""

from __future__ import annotations

import threading

import pytest
from support import eventually

from millstream.client.channel import wake_chain as wake_chain_module
from millstream.client.channel.wake_chain import WakeChain


@pytest.fixture
def chain() -> WakeChain:
    return WakeChain()


def sleeper() -> threading.Lock:
    waiter = threading.Lock()
    waiter.acquire()
    return waiter


def woken(*waiters: threading.Lock) -> list[bool]:
    return [not waiter.locked() for waiter in waiters]


def test_each_wakes_the_next(chain: WakeChain) -> None:
    first, second, third = sleeper(), sleeper(), sleeper()

    chain.wake([first, second])
    chain.wake([third])
    assert woken(first, second, third) == [True, False, False]
    assert chain.due == 3

    chain.leave(first)
    assert woken(second, third) == [True, False]
    chain.leave(second)
    assert woken(third) == [True]
    assert chain.due == 1
    chain.leave(third)
    assert not chain.due

    after = sleeper()
    chain.wake([after])
    assert woken(after) == [True]


def test_one_that_leaves_before_its_turn_is_passed_over(chain: WakeChain) -> None:
    first, second, third = sleeper(), sleeper(), sleeper()
    chain.wake([first, second, third])

    chain.leave(second)
    chain.leave(first)

    assert woken(second, third) == [False, True]
    assert chain.due == 1


def test_one_that_never_leaves_holds_the_others_up_until_one_of_them_looks_for_itself(chain: WakeChain) -> None:
    lost, second, third, fourth = sleeper(), sleeper(), sleeper(), sleeper()
    chain.wake([lost, second, third, fourth])

    chain.leave(second)
    assert woken(third, fourth) == [True, False]
    chain.leave(third)
    assert woken(fourth) == [True]


@pytest.mark.parametrize(("threads", "first_of_them"), [(1, 1), (2, 2), (9, 3)])
def test_whoever_waits_for_some_of_them_is_woken_after_these(
    chain: WakeChain, threads: int, first_of_them: int
) -> None:
    waiters = [sleeper() for _ in range(4)]
    chain.wake(waiters[:3])
    waiting = threading.Thread(target=chain.wait_for, args=(threads, 60.0))
    waiting.start()
    eventually(lambda: chain.due == 4)
    chain.wake(waiters[3:])

    for waiter in waiters[:first_of_them]:
        assert waiting.is_alive()
        chain.leave(waiter)
    waiting.join(10.0)

    assert not waiting.is_alive()
    # Its turn went on to the next one.
    assert woken(*waiters) == [at <= first_of_them for at in range(4)]


def test_whoever_waits_for_nobody_goes_on_at_once(chain: WakeChain) -> None:
    chain.wait_for(1, 60.0)

    assert not chain.due


def test_whoever_ran_out_of_patience_before_its_turn_changes_nothing(chain: WakeChain) -> None:
    first, second = sleeper(), sleeper()
    chain.wake([first, second])

    chain.wait_for(1, 0.0)

    assert woken(first, second) == [True, False]
    assert chain.due == 2


@pytest.mark.parametrize(("all_at_once_s", "at_once"), [(60.0, True), (0.0, False)])
def test_where_threads_compute_all_are_woken_at_once_for_a_while(
    chain: WakeChain, monkeypatch: pytest.MonkeyPatch, all_at_once_s: float, at_once: bool
) -> None:
    # Whoever is woken then runs too late.
    monkeypatch.setattr(wake_chain_module, "SLOW_S", -1.0)
    monkeypatch.setattr(wake_chain_module, "ALL_AT_ONCE_S", all_at_once_s)
    first, second, third = sleeper(), sleeper(), sleeper()
    chain.wake([first, second, third])

    chain.leave(first)
    assert woken(second, third) == [True, at_once]

    chain.leave(second)
    chain.leave(third)
    late, later = sleeper(), sleeper()
    chain.wake([late, later])
    assert woken(late, later) == [True, at_once]


def test_a_single_slow_thread_makes_no_crowd(chain: WakeChain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake_chain_module, "SLOW_S", 60.0)
    first, second, third = sleeper(), sleeper(), sleeper()
    chain.wake([first, second, third])

    chain.leave(first)

    assert woken(second, third) == [True, False]


def test_whoever_was_not_to_be_woken_changes_nothing(chain: WakeChain) -> None:
    first, second = sleeper(), sleeper()
    chain.wake([first, second])

    chain.leave(sleeper())

    assert woken(first, second) == [True, False]


def test_a_forked_child_begins_anew(chain: WakeChain) -> None:
    chain.wake([sleeper(), sleeper()])
    # As a thread of the parent may have held it.
    holder = threading.Thread(target=chain._lock.acquire)
    holder.start()
    holder.join()

    chain.after_fork()

    mine = sleeper()
    chain.wake([mine])
    assert woken(mine) == [True]


def test_all_threads_wake_whatever_the_order_of_their_patience(chain: WakeChain) -> None:
    waiters = [sleeper() for _ in range(64)]

    def sleep(waiter: threading.Lock, patience_s: float) -> None:
        waiter.acquire(timeout=patience_s)
        chain.leave(waiter)

    # Every third one looks for itself just about when it is woken.
    threads = [
        threading.Thread(target=sleep, args=(waiter, 0.01 if at % 3 == 1 else 30.0))
        for at, waiter in enumerate(waiters)
    ]
    # First: who has left already must not be woken.
    for waiter in waiters:
        chain.wake([waiter])
    for thread in threads:
        thread.start()

    eventually(lambda: not any(thread.is_alive() for thread in threads))
    assert not chain.due
