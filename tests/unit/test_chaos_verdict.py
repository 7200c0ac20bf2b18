"""The fault injector's verdict names every way in which a promise can be broken."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from chaos_lib.journal import Journal, Turn, replay
from chaos_lib.ledger import CANCELLED, OK, Account, Book, read
from chaos_lib.ordered import Harm, Hold, OrderedEnd
from chaos_lib.verdict import Evidence, State, judge, lost_by_the_server

from millstream.broker.contract.keys import DEFAULT_PREFIX, ServiceKeys

KEYS = ServiceKeys("embed")
STREAM, REPLIES = KEYS.streams()[1], KEYS.reply("c1")
STATE = State(
    depth=0,
    pending=0,
    dead=["bad"],
    consumers=["w1", "returned"],
    live=["w1"],
    keys=[f"{DEFAULT_PREFIX}:services", KEYS.spec(), KEYS.dead(), *KEYS.streams()],
)
JOURNAL = Journal(Counter("ab") + Counter(["bad"]), Counter("ab") + Counter(["bad"]), deliveries=[(900, "bad", 3)])


def account(*, killed: bool = False) -> Account:
    """Two calls, one of them cancelled; of a killed process, without its outcomes."""
    account = Account("client0", killed, {"one", "two"}, {"one": "a", "two": "b"})
    if not killed:
        account.answers |= {"one": [OK], "two": [CANCELLED]}
    return account


def evidence() -> Evidence:
    """A run that went well: two calls, and a poison job."""
    return Evidence(
        accounts=[account(), account(killed=True)],
        journal=JOURNAL,
        poison={"bad": 1},
        found={"embed:1x1:d": OK},
        quiet_until=500,
        state=STATE,
        workers=1,
        synced=True,
        problems=[],
        landed={"worker killed": 1},
    )


def violated(found: Evidence) -> list[str]:
    return [finding.says for finding in judge(found, KEYS) if not finding.holds]


def answered(*outcomes: str) -> Evidence:
    """The first call had these outcomes."""
    broken = account()
    broken.answers["one"] = list(outcomes)
    return replace(evidence(), accounts=[broken])


def written(**changes: object) -> Evidence:
    """The server wrote down something else."""
    return replace(evidence(), journal=replace(JOURNAL, **changes))  # type: ignore[arg-type]


def ordered_end(*after: Turn) -> Evidence:
    """A worker that held one entry was told to end, and these were the entry's turns after that."""
    turns = [Turn(550, "w1", 1), *after]
    entry = (STREAM, b"1-0")
    journal = replace(JOURNAL, turns={entry: turns}, job_of={entry: "a"})
    return replace(evidence(), journal=journal, ordered=[OrderedEnd(600, 700, {entry: Hold("w1", 1)})])


def left(**changes: object) -> Evidence:
    """The server holds something else in the end."""
    return replace(evidence(), state=replace(STATE, **changes))  # type: ignore[arg-type]


def test_nothing_is_violated_where_all_went_well() -> None:
    assert violated(evidence()) == []


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (answered(), "every call of a living client has its outcome"),
        (answered("wrong rows"), "every outcome is the call's own, or its cancellation"),
        (answered(OK, OK), "no client saw a second outcome"),
        (replace(evidence(), found={"embed:1x1:d": "gone"}), "detached calls of killed clients can be fetched"),
        (written(jobs=Counter(["a", "b", "bad", "bad"])), "no job entered twice"),
        (written(replies=Counter(["a", "bad"])), "every job was answered, or cancelled before it ran"),
        (written(replies=Counter(["a", "b", "b", "bad"])), "no job was answered twice"),
        (written(deliveries=[(400, "a", 2)]), "no outage of server or network cost a job an attempt"),
        (ordered_end(Turn(650, "returned", 3)), "no ordered end of a worker cost a job an attempt"),
        (left(dead=["bad", "a"]), "no innocent job is among the dead letters"),
        (left(dead=[]), "every poison job is, and was answered once"),
        (replace(evidence(), poison={"bad": 0}), "every poison job is, and was answered once"),
        (left(depth=1), "the queue is empty"),
        (left(pending=1), "nothing is pending"),
        (left(consumers=["w1", "w0"]), "no consumer but the living"),
        (replace(evidence(), workers=2), "all workers live"),
        (left(keys=[KEYS.seen("a")]), "no key stays for ever"),
        (replace(evidence(), problems=["an orphan"]), "nothing else went wrong"),
        (replace(evidence(), landed={"worker killed": 0}), "every kind of fault landed"),
    ],
)
def test_a_broken_promise_is_named(broken: Evidence, says: str) -> None:
    assert violated(broken) == [says]


def test_an_ordered_end_may_cost_the_half_attempt_of_a_host_that_was_lost_meanwhile() -> None:
    for count in (1, 2):
        assert violated(ordered_end(Turn(650, "returned", count), Turn(660, "w2", count))) == []


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [Turn(650, "returned", 1), Turn(660, "w2", 1), Turn(690, "returned", 3)],
        [Turn(650, "returned", 2), Turn(660, "w2", 2), Turn(690, "returned", 4)],
    ],
    ids=["never given back", "charged for the next worker", "and half for a lost host"],
)
def test_what_the_next_worker_cost_a_job_is_not_charged_to_the_ordered_end_of_the_one_before(turns: list[Turn]) -> None:
    assert violated(ordered_end(*turns)) == []


@pytest.mark.parametrize(
    "turns",
    [
        [Turn(650, "w1", 3)],
        [Turn(650, "returned", 1), Turn(655, "returned", 3), Turn(660, "w2", 3)],
        [Turn(650, "returned", 1), Turn(660, "w2", 3)],
        [Turn(9_000, "returned", 3)],
    ],
    ids=["before it is given back", "while it waits", "with its delivery", "long after the order"],
)
def test_an_attempt_between_the_ordered_end_and_the_next_worker_is_a_violation(turns: list[Turn]) -> None:
    assert violated(ordered_end(*turns)) == ["no ordered end of a worker cost a job an attempt"]


def test_a_worker_that_gave_an_entry_back_and_took_it_again_is_judged_by_its_last_turn() -> None:
    again = ordered_end(Turn(560, "returned", 1), Turn(565, "w2", 1), Turn(570, "returned", 3), Turn(580, "w1", 3))
    (end,) = again.ordered
    at_three = replace(end, held={entry: Hold("w1", 3) for entry in end.held})

    assert violated(replace(again, ordered=[at_three])) == []


def test_a_charged_entry_is_told_with_its_turns_its_deaths_and_what_fell_meanwhile() -> None:
    broken = ordered_end(Turn(650, "returned", 3), Turn(660, "w2", 3))
    entry, other = (STREAM, b"1-0"), (STREAM, b"2-0")
    assert broken.journal
    journal = replace(
        broken.journal,
        job_of={entry: "a", other: "bad"},
        trail={entry: ["650 w1 was killed by SIGKILL during run"]},
        batches={"w1@650": {entry, other}},
    )
    harms = [Harm("worker killed", 620, 690), Harm("server killed", 100, 200), Harm("poison job", 655, 900)]

    (finding,) = [each for each in judge(replace(broken, journal=journal, harms=harms), KEYS) if not each.holds]

    assert finding.violations == [
        f"{STREAM} 1-0, job a, beside poison | w1 held it at 1, +0.05 returned 1 to 3, +0.06 w2 3 to 3 | "
        "charged for: w1 was killed by SIGKILL during run | its supervisor ended +0.10 | "
        "meanwhile: worker killed +0.02 to +0.09"
    ]


def test_every_promise_has_its_counterexample() -> None:
    (cases,) = [mark.args[1] for mark in test_a_broken_promise_is_named.pytestmark]  # type: ignore[attr-defined]

    assert {finding.says for finding in judge(evidence(), KEYS)} - {says for _, says in cases} == {
        "the server knows every acknowledged job"
    }


def forgotten(*, killed: bool, where: str) -> Evidence:
    """One call that was acknowledged and is in nobody's history."""
    lost = Account("raw0", killed, {"one"}, {"one": where})
    return replace(evidence(), accounts=[lost])


def test_an_acknowledged_job_without_an_entry_is_a_violation_only_where_each_write_is_synced() -> None:
    silent = forgotten(killed=True, where="one")

    assert violated(silent) == ["the server knows every acknowledged job"]
    assert violated(replace(silent, synced=False)) == []
    assert lost_by_the_server(silent) == ["one"]


def test_a_call_that_a_killed_client_only_began_need_not_be_known() -> None:
    assert violated(forgotten(killed=True, where="its handle's id")) == []


def test_a_second_reply_after_the_server_forgot_the_first_is_told_from_one_that_was_written_twice() -> None:
    seen_twice = replace(answered(OK, OK), synced=False)
    call_is_job = replace(seen_twice, journal=replace(JOURNAL, replies=Counter(["a", "b", "bad", "one"])))
    twice_written = replace(seen_twice, journal=replace(JOURNAL, replies=Counter(["b", "bad", "a"] + 2 * ["one"])))

    assert violated(call_is_job) == []
    assert "no client saw a second outcome" in violated(twice_written)


def test_a_reply_that_a_new_master_forgot_may_come_twice_and_a_job_that_it_forgot_may_not_be_missing() -> None:
    again = replace(answered(OK, OK), journal=None, poison={"bad": 2})
    silent = replace(answered(), journal=None, forgets=True)

    assert violated(replace(again, forgets=True)) == []
    assert violated(again) == ["no client saw a second outcome", "every poison job is, and was answered once"]
    assert violated(silent) == ["every call of a living client has its outcome"]


def test_the_journal_counts_entries_replies_and_charged_deliveries() -> None:
    text = f"""\
XADD {STREAM} 1-0 v 1 id a body x
XADD ms:{{other}}:q:normal 1-0 v 1 id b body x
XCLAIM {STREAM} workers w1 0 1-0 TIME 700 RETRYCOUNT 1 FORCE JUSTID
XCLAIM {STREAM} workers w1 0 1-0 TIME 750 RETRYCOUNT 1 FORCE JUSTID
XCLAIM {STREAM} workers returned 0 1-0 TIME 800 RETRYCOUNT 3 FORCE JUSTID
XADD {REPLIES} 2-0 id a reply x
HSET {KEYS.call("d")} payload x jobs 1 ttl 9 c x
HSET {KEYS.call("d")} c x
HSET {KEYS.trail()} 2:1-0 800,w1,crashed 2:1-0:batch w1@800,1,0
SET {KEYS.seen("c")} x PXAT 900"""

    commands = [[word.replace(b",", b" ") for word in line.encode().split()] for line in text.splitlines()]
    journal = replay(commands, KEYS)

    entry = (STREAM, b"1-0")
    assert journal == Journal(
        Counter("a"),
        Counter("ac"),
        deliveries=[(800, "a", 3)],
        job_of={entry: "a"},
        turns={entry: [Turn(700, "w1", 1), Turn(800, "returned", 3)]},
        trail={entry: ["800 w1 crashed"]},
        batches={"w1@800": {entry}},
    )
    assert (journal.attempts_before(800), journal.attempts_before(801)) == ([], ["a"])
    assert journal.most_attempts == 1.0


def test_a_job_that_went_unanswered_while_no_worker_held_it_was_withdrawn() -> None:
    text = f"""\
XADD {STREAM} 1-0 v 1 id waited body x
XADD {STREAM} 2-0 v 1 id returned body x
XADD {STREAM} 3-0 v 1 id held body x
XADD {STREAM} 4-0 v 1 id answered body x
XCLAIM {STREAM} workers w1 0 2-0 TIME 700 RETRYCOUNT 1 FORCE JUSTID
XCLAIM {STREAM} workers w1 0 3-0 TIME 700 RETRYCOUNT 1 FORCE JUSTID
XCLAIM {STREAM} workers returned 0 2-0 TIME 800 RETRYCOUNT 3 FORCE JUSTID
XADD {REPLIES} 9-0 id answered reply x
XDEL {STREAM} 1-0 2-0 3-0 4-0"""

    journal = replay([line.encode().split() for line in text.splitlines()], KEYS)

    assert journal.withdrawn == {"waited", "returned"}


def test_a_book_is_read_as_it_was_written_but_for_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "client0.jsonl"
    book = Book(path)
    book.sent("one", ["row"])
    book.accepted("one", "a")
    book.answered("one", OK)
    book.sent("two", ["row"])
    book.close()
    with path.open("a") as file:
        file.write('["answ')

    account = read(path, killed=True)

    assert (account.name, account.killed, account.sent) == ("client0", True, {"one", "two"})
    assert (account.accepted, account.answers, account.unanswered) == ({"one": "a"}, {"one": [OK]}, ["two"])
