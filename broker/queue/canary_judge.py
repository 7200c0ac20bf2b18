"""Judge of a canary: whether the new version is as good as the others, and what follows from that. Pure.

Both are judged on the same time window, which begins with the step. Before the window ends only a difference ends the
canary that chance does not explain: it is looked at every second, and the more often one looks, the more chance shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Literal, NamedTuple

from millstream.broker.config.canary import CanaryPlan
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.queue.canary_sample import Sample
from millstream.broker.queue.canary_state import CanaryState

LEAST_CALLS = 200
"""Calls of the new version in a window below which there is no verdict."""

EARLY_DEVIATIONS = 3.0
"""Standard deviations beyond a limit from which on a version is bad before its window ends."""

SLOWEST = 0.01
"""Share of calls that a 99th percentile leaves out."""


class Verdict(NamedTuple):
    """Verdict on a version: `open` if too few calls are known. `reason` says why it is bad."""

    of: Literal["open", "good", "bad"]
    reason: str = ""


def weights_of(before: Mapping[str, float], to: str, percent: float) -> dict[str, float]:
    """Returns weights by which `to` gets `percent` of the calls, and the others the rest, as they shared it before.

    Raises InvalidRequest if no other version has a weight.
    """
    others = {version: weight for version, weight in before.items() if version != to}
    whole = sum(others.values())
    if not whole:
        raise InvalidRequest(
            f"no version but {to!r} has a weight, so there is none to compare it with",
            hint="give another one a weight first: `millstream route set`",
        )
    shares = {version: (100.0 - percent) * weight / whole for version, weight in others.items()}
    return {version: percent if version == to else shares[version] for version in {**before, to: 0.0}}


def begin(
    plan: CanaryPlan, weights: Mapping[str, float], samples: tuple[Sample, Sample], now: int, run: str
) -> CanaryState:
    """Returns the first state of a canary on a route with these weights. `samples` are the totals at `now`, server ms,
    of the new version and of the others. Raises InvalidRequest if no other version has a weight.
    """
    new, old = samples
    at_first = weights_of(weights, plan.to, plan.steps[0])
    return CanaryState(run=run, plan=plan, weights=at_first, before=dict(weights), since=now, new=new, old=old)


def advance(state: CanaryState, new: Sample, old: Sample, now: int) -> CanaryState:
    """Returns the state that follows, given the totals of the new version and of the others at `now`, server ms.

    Returns `state` itself if nothing changes.
    """
    done, compared = new.since(state.new), old.since(state.old)
    if done is None or compared is None or now < state.since:
        return replace(state, since=now, new=new, old=old)
    is_over = now - state.since >= state.plan.every * 1000
    verdict = judge(state.plan, done, known_others(state, compared), is_over=is_over)
    if verdict.of == "bad":
        return replace(state, status="rolled_back", weights=state.before, since=now, reason=verdict.reason)
    if verdict.of == "open" or not is_over:
        return state
    if state.step + 1 == len(state.plan.steps):
        return replace(state, status="promoted", weights=weights_of(state.before, state.plan.to, 100), since=now)
    percent = state.plan.steps[state.step + 1]
    weights = weights_of(state.before, state.plan.to, percent)
    others = known_others(state, compared)
    return replace(state, step=state.step + 1, weights=weights, since=now, new=new, old=old, others=others)


def known_others(state: CanaryState, compared: Sample) -> Sample:
    """Returns what the others did in the window, or in the step before if they had too few calls, as at 100 %."""
    return compared if compared.calls >= LEAST_CALLS or state.others is None else state.others


def judge(plan: CanaryPlan, new: Sample, others: Sample, *, is_over: bool) -> Verdict:
    """Returns the verdict on what the new version did, beside what the others did. `is_over`: the window has ended."""
    if new.calls < LEAST_CALLS:
        return Verdict("open")
    deviations = 0.0 if is_over else EARLY_DEVIATIONS
    if _exceeds(new.failed, new.rows, others.error_rate + plan.max_error_rate, deviations):
        return Verdict(
            "bad",
            f"{new.error_rate:.1%} of its rows failed ({new.failed} of {new.rows}), and {others.error_rate:.1%} of the "
            f"others'; max_error_rate is {plan.max_error_rate:g}",
        )
    slowest = others.p99_ms if others.latency.count >= LEAST_CALLS else None
    if slowest is None:
        return Verdict("good")
    if new.latency.count < LEAST_CALLS:
        return Verdict("open")
    if _exceeds(new.latency.above(slowest * plan.max_p99_ratio), new.latency.count, SLOWEST, deviations):
        return Verdict(
            "bad",
            f"its p99 is {new.p99_ms:.0f} ms, {(new.p99_ms or 0) / slowest:.2f} times the others' {slowest:.0f} ms; "
            f"max_p99_ratio is {plan.max_p99_ratio:g}",
        )
    return Verdict("good")


def _exceeds(count: float, whole: int, limit: float, deviations: float) -> bool:
    """Returns whether `count` of `whole` is a larger share than `limit`, by that many standard deviations.

    It is the lower bound of Wilson's interval, which holds for small shares and counts, too.
    """
    if not whole:
        return False
    share, squared = count / whole, deviations * deviations
    middle = share + squared / (2 * whole)
    half = deviations * sqrt(share * (1 - share) / whole + squared / (4 * whole * whole))
    return (middle - half) / (1 + squared / whole) > limit
