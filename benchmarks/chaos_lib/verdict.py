"""Whether every invariant held: pure functions of what was written down while the faults fell."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from chaos_lib.journal import Journal
from chaos_lib.ledger import CANCELLED, OK, Account
from chaos_lib.ordered import Cost, Harm, OrderedEnd, costs, told
from millstream.broker.contract.keys import DEFAULT_PREFIX, RETURNED, ServiceKeys, services_key

NAMED = 3
"""So many culprits are named; the others are counted."""


@dataclass(frozen=True)
class Finding:
    """One invariant: what it says, how much was looked at, and who broke it."""

    says: str
    looked_at: int
    violations: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        return not self.violations

    def __str__(self) -> str:
        if self.holds:
            return f"ok        {self.says} ({self.looked_at})"
        named = "; ".join(self.violations[:NAMED])
        return f"VIOLATED  {self.says} ({len(self.violations)} of {self.looked_at}): {named}"


@dataclass(frozen=True)
class State:
    """What the server holds after the drain. `keys` are those without a ttl."""

    depth: int
    pending: int
    dead: Sequence[str]
    consumers: Collection[str]
    live: Collection[str]
    keys: Sequence[str]


@dataclass(frozen=True)
class Evidence:
    """All that is known of a run. Without a `journal` what only the server could say is not asked.

    `found` is what became of the detached calls of killed clients, by the id of the call; `quiet_until` is when, server
    ms, the phase ended in which nothing but the server and the network failed. `synced`: the server acknowledged
    nothing that was not on its disk. `forgets`: a new master may not know of a reply that was read already.
    `ordered` are the ends of workers that somebody asked for, `harms` all faults with their times.
    """

    accounts: Sequence[Account]
    journal: Journal | None
    poison: Mapping[str, int]
    found: Mapping[str, str]
    quiet_until: int
    state: State
    workers: int
    synced: bool
    problems: Sequence[str]
    landed: Mapping[str, int]
    forgets: bool = False
    ordered: Sequence[OrderedEnd] = ()
    harms: Sequence[Harm] = ()


def judge(evidence: Evidence, keys: ServiceKeys) -> list[Finding]:
    """Every invariant, held or not."""
    return [*_calls(evidence), *_jobs(evidence), *_burials(evidence), *_remains(evidence, keys)]


def lost_by_the_server(evidence: Evidence) -> list[str]:
    """Calls that were acknowledged, and of which the server's own history knows nothing: only without a sync of each
    write. Those of killed clients count where it was the server itself that acknowledged them.
    """
    journal = evidence.journal
    return [
        call
        for account in evidence.accounts
        for call, where in account.accepted.items()
        if (not account.killed or where == call or ":" in where)
        and journal is not None
        and where.rpartition(":")[2] not in journal.jobs
        and OK not in account.answers[call]
        and CANCELLED not in account.answers[call]
    ]


def answered_again(evidence: Evidence) -> list[str]:
    """Calls with more than one outcome, but for those whose first reply the server forgot with all that followed."""
    journal = evidence.journal
    return [
        call
        for account in evidence.accounts
        for call, outcomes in account.answers.items()
        if len(outcomes) > 1 and (evidence.synced or journal is None or journal.replies[call] > 1)
    ]


def ordered_costs(evidence: Evidence) -> list[tuple[OrderedEnd, Cost]]:
    """What became of each entry that was held when its worker's end was ordered."""
    journal = evidence.journal
    return [(end, cost) for end in evidence.ordered for cost in costs(end, journal)] if journal else []


def innocents_buried(evidence: Evidence) -> list[str]:
    """Dead letters that are no poison."""
    return [job for job in evidence.state.dead if job not in evidence.poison]


def _calls(evidence: Evidence) -> Iterator[Finding]:
    excused = set() if evidence.synced else set(lost_by_the_server(evidence))
    accounts = [account for account in evidence.accounts if not account.killed]
    sent = [(account, call) for account in accounts for call in account.sent]
    silent = [call for account, call in sent if not account.answers[call] and call not in excused]
    yield Finding("every call of a living client has its outcome", len(sent), silent)
    answers = [
        (call, outcome) for account in evidence.accounts for call, all_ in account.answers.items() for outcome in all_
    ]
    wrong = [
        f"{call}: {outcome}" for call, outcome in answers if outcome not in (OK, CANCELLED) and call not in excused
    ]
    yield Finding("every outcome is the call's own, or its cancellation", len(answers), wrong)
    yield Finding("no client saw a second outcome", len(answers), [] if evidence.forgets else answered_again(evidence))
    bad = [f"{call}: {outcome}" for call, outcome in evidence.found.items() if outcome not in (OK, CANCELLED)]
    yield Finding("detached calls of killed clients can be fetched", len(evidence.found), bad)


def _jobs(evidence: Evidence) -> Iterator[Finding]:
    journal = evidence.journal
    if journal is None:
        return
    if evidence.synced:
        lost = lost_by_the_server(evidence)
        yield Finding("the server knows every acknowledged job", sum(len(a.accepted) for a in evidence.accounts), lost)
    twice = [job for job, entries in journal.jobs.items() if entries > 1]
    yield Finding("no job entered twice", len(journal.jobs), twice)
    silent = [job for job in journal.jobs if not journal.replies[job] and job not in journal.withdrawn]
    yield Finding("every job was answered, or cancelled before it ran", len(journal.jobs), silent)
    again = [job for job, replies in journal.replies.items() if replies > 1]
    yield Finding("no job was answered twice", sum(journal.replies.values()), again)
    charged = journal.attempts_before(evidence.quiet_until)
    yield Finding("no outage of server or network cost a job an attempt", len(journal.jobs), charged)
    held = ordered_costs(evidence)
    ordered = [told(cost, end, journal, evidence.poison, evidence.harms) for end, cost in held if cost.charged]
    yield Finding("no ordered end of a worker cost a job an attempt", len(held), ordered)


def _burials(evidence: Evidence) -> Iterator[Finding]:
    dead = evidence.state.dead
    yield Finding("no innocent job is among the dead letters", len(dead), innocents_buried(evidence))
    alive = [
        job
        for job, replies in evidence.poison.items()
        if job not in dead or not replies or (replies > 1 and not evidence.forgets)
    ]
    yield Finding("every poison job is, and was answered once", len(evidence.poison), alive)


def _remains(evidence: Evidence, keys: ServiceKeys) -> Iterator[Finding]:
    state = evidence.state
    yield Finding("the queue is empty", state.depth, ["jobs are left"] * state.depth)
    yield Finding("nothing is pending", state.pending, ["an entry is held"] * state.pending)
    strangers = sorted(set(state.consumers) - set(state.live) - {RETURNED})
    yield Finding("no consumer but the living", len(state.consumers), strangers)
    missing = [] if len(state.live) == evidence.workers else [f"{len(state.live)} live of {evidence.workers}"]
    yield Finding("all workers live", len(state.live), missing)
    kept = {services_key(DEFAULT_PREFIX), keys.spec(), keys.dead(), keys.paused(), keys.bell(), *keys.streams()}
    yield Finding("no key stays for ever", len(state.keys), [key for key in state.keys if key not in kept])
    yield Finding("nothing else went wrong", len(evidence.problems), evidence.problems)
    never = [name for name, landed in evidence.landed.items() if not landed]
    yield Finding("every kind of fault landed", sum(evidence.landed.values()), never)
