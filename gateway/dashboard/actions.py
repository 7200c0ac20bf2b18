"""The actions of an operator: forms that a page of their own confirms. They call what the command line calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from starlette.responses import Response

from millstream.broker.config.units import seconds
from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.queue import pause as pauses
from millstream.broker.queue.deadletters import DeadLetters, Letter
from millstream.broker.queue.figure_text import quantity
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import translated
from millstream.client.detached_id import DetachedId
from millstream.gateway.dashboard.same_origin import COOKIE
from millstream.gateway.dashboard.state import Dashboard, dashboard_of

Form = dict[str, str]

MOST_AT_ONCE = 1_000
"""Dead letters that one click runs again at most, so that a page answers in seconds."""


async def checked_form(request: Request) -> Form:
    """Returns the fields of a form, if its token belongs to the browser's cookie. Raises HTTPException if not."""
    dashboard = dashboard_of(request)
    form = dict(parse_qsl((await request.body()).decode(errors="replace"), keep_blank_values=True))
    if not dashboard.tokens.is_valid(request.cookies.get(COOKIE, ""), form.get("token", "")):
        raise HTTPException(403, "This form is too old, or not from this page. Nothing was changed: try again.")
    return form


def may_act(request: Request) -> None:
    """Raises HTTPException if the user may not act: pages that ask for a confirmation are of no use to others."""
    if not request.state.may_act:
        raise HTTPException(403, "You may look, but not act.")


router = APIRouter(dependencies=[Depends(may_act)])
Shared = Annotated[Dashboard, Depends(dashboard_of)]
Fields = Annotated[Form, Depends(checked_form)]


# -- pause and resume ------------------------------------------------------------------------------------------------


@router.get("/services/{service}/pause")
def ask_pause(request: Request, dashboard: Shared, service: str) -> Response:
    return dashboard.state_page(request, "pause.html", service)


@router.post("/services/{service}/pause")
def pause(request: Request, dashboard: Shared, service: str, form: Fields) -> Response:
    for_s = _duration(form.get("for", ""))
    refusing = "refusing" in form
    with _registered(dashboard, service):
        pauses.pause(dashboard.connection.client, dashboard.keys(service), for_s=for_s, refusing=refusing)
    lasts = f"for {for_s:g} s" if for_s else "until it is resumed"
    text = f"{service} is paused {lasts}{', and refuses new jobs' if refusing else ''}."
    return dashboard.done(request, text, f"/services/{service}")


@router.post("/services/{service}/resume")
def resume(request: Request, dashboard: Shared, service: str, form: Fields) -> Response:
    with _registered(dashboard, service):
        was_paused = pauses.resume(dashboard.connection.client, dashboard.keys(service))
    text = f"{service} is resumed." if was_paused else f"{service} was not paused."
    return dashboard.done(request, text, f"/services/{service}")


# -- dead letters ----------------------------------------------------------------------------------------------------


@router.get("/services/{service}/dead/{verb}/confirm")
def confirm(
    request: Request, dashboard: Shared, service: str, verb: str, letter_id: Annotated[str, Query(alias="id")] = ""
) -> Response:
    """Asks before dead letters are run again or removed: the one with this id, or all that exist at this moment."""
    if verb not in ("requeue", "purge"):
        raise HTTPException(404)
    letters = _letters(dashboard, service)
    with translated(dashboard.connection.safe_url):
        newest = [letters.find(letter_id)] if letter_id else letters.page(1)
        total = 1 if letter_id else len(letters)
    if not newest:
        raise InvalidRequest(f"service {service!r} has no dead letter")
    return dashboard.page(
        request, "confirm.html", service=service, verb=verb, letter_id=letter_id, newest=newest[0], total=total
    )


@router.post("/services/{service}/dead/requeue")
def requeue(request: Request, dashboard: Shared, service: str, form: Fields) -> Response:
    letters = _letters(dashboard, service)
    done: list[DetachedId] = []
    failures: list[MillstreamError] = []
    with translated(dashboard.connection.safe_url):
        for letter in _chosen(letters, form):
            try:
                job_id = letters.requeue(letter)
                done.append(DetachedId.of_job(service, int(letter.fields[b"rows"]), job_id))
            except InvalidRequest as error:
                failures.append(error)
            except MillstreamError as error:
                # The queue is full or refuses: it would refuse the others, too.
                failures.append(error)
                break
    return dashboard.done(request, _requeued(done, failures), f"/services/{service}/dead")


@router.post("/services/{service}/dead/purge")
def purge(request: Request, dashboard: Shared, service: str, form: Fields) -> Response:
    letters = _letters(dashboard, service)
    with translated(dashboard.connection.safe_url):
        removed = letters.remove([form["id"]]) if form.get("id") else letters.purge(until=_until(form))
    return dashboard.done(request, f"{quantity(removed, 'dead letter')} removed.", f"/services/{service}/dead")


@contextmanager
def _registered(dashboard: Dashboard, service: str) -> Iterator[None]:
    """Raises UnknownService if the service is not registered. In its block the library's errors are raised as ours."""
    with translated(dashboard.connection.safe_url):
        Registry(dashboard.connection, dashboard.prefix).read(service)
        yield


def _letters(dashboard: Dashboard, service: str) -> DeadLetters:
    with translated(dashboard.connection.safe_url):
        return DeadLetters.open(dashboard.connection, dashboard.keys(service))


def _chosen(letters: DeadLetters, form: Form) -> Iterator[Letter]:
    """Yields the letter that the form names, or the newest ones of those that its page counted."""
    if form.get("id"):
        yield letters.find(form["id"])
    else:
        yield from islice(letters.up_to(_until(form)), MOST_AT_ONCE)


def _duration(text: str) -> float | None:
    """Returns seconds, None for no end. Raises InvalidRequest."""
    if not text.strip():
        return None
    try:
        for_s = seconds(text)
    except ValueError as error:
        raise InvalidRequest(f"the duration {error}") from None
    if not for_s:
        raise InvalidRequest("the duration must be above 0")
    return for_s


def _until(form: Form) -> str:
    """Returns the newest letter that the user was asked about: later ones are not touched."""
    if not form.get("until"):
        raise InvalidRequest("the form names no dead letter")
    return form["until"]


def _requeued(done: list[DetachedId], failures: list[MillstreamError]) -> str:
    shown = f": {done[0]}" if len(done) == 1 else ""
    text = f"{quantity(len(done), 'dead letter')} run again{shown}."
    return f"{text} {quantity(len(failures), 'failure')}: {failures[0]}" if failures else text
