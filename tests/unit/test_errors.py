"""Every error survives the wire as itself."""

from __future__ import annotations

import inspect
import json

import pytest

from millstream.broker.contract import errors
from millstream.broker.contract.errors import (
    DeadlineExceeded,
    MillstreamError,
    PartialFailure,
    UnknownService,
    described,
    did_you_mean,
    from_wire,
    to_wire,
)

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, MillstreamError) and cls is not PartialFailure
]


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [*(cls.code for cls in CLASSES), PartialFailure.code]

    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_comes_back_as_itself(cls: type[MillstreamError]) -> None:
    again = from_wire(to_wire(cls("what", hint="do this", retry_after=1.5)))

    assert type(again) is cls
    assert (again.message, again.hint, again.retry_after) == ("what", "do this", 1.5)
    assert str(again) == "what (do this)"


def test_what_a_class_adds_comes_back_too() -> None:
    late = from_wire(to_wire(DeadlineExceeded("late", phase="queue")))
    unknown = from_wire(to_wire(UnknownService("which", did_you_mean="embed")))

    assert isinstance(late, DeadlineExceeded)
    assert late.phase == "queue"
    assert isinstance(unknown, UnknownService)
    assert unknown.did_you_mean == "embed"


def test_without_hint_and_retry_after_there_are_none() -> None:
    again = from_wire(to_wire(MillstreamError("what")))

    assert (again.hint, again.retry_after, str(again)) == ("", None, "what")


def test_a_code_of_a_newer_version_becomes_the_base_class_with_its_message() -> None:
    again = from_wire({"code": "from_the_future", "message": "what", "hint": "upgrade", "flux": 1})

    assert type(again) is MillstreamError
    assert str(again) == "what (upgrade)"


@pytest.mark.parametrize("wire", [{}, {"code": 5}, {"code": None, "message": None, "retry_after": "soon"}])
def test_a_wire_form_that_is_not_ours_is_an_error_all_the_same(wire: dict[str, object]) -> None:
    again = from_wire(wire)

    assert type(again) is MillstreamError
    assert again.retry_after is None


def test_a_partial_failure_that_someone_sent_does_not_break_its_reader() -> None:
    assert isinstance(from_wire({"code": PartialFailure.code, "message": "some rows"}), MillstreamError)


def test_the_nearest_name_is_offered_and_none_where_none_is_near() -> None:
    assert did_you_mean("embd", ["rerank", "embed"]) == "embed"
    assert did_you_mean("embd", ["chat"]) == ""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no water"), "ValueError: no water"),
        (Unspeakable(), "Unspeakable: its message cannot be read"),
        (ValueError("\ud800"), "ValueError: \\ud800"),
        (ValueError("x" * 900), "ValueError: " + "x" * 488),
    ],
)
def test_an_error_of_foreign_code_is_described_whatever_it_is(error: Exception, said: str) -> None:
    assert described(error) == said


def test_a_message_with_half_a_character_travels() -> None:
    assert json.dumps(to_wire(MillstreamError("a \udfff", hint="\ud800")), ensure_ascii=False).encode()
