"""`serve` refuses at once what it cannot do."""

from __future__ import annotations

import threading

import pytest

from millstream.broker.contract.errors import BrokerUnavailable, InvalidRequest, MillstreamError
from millstream.worker import serve


def test_it_serves_in_the_main_thread_alone() -> None:
    errors: list[MillstreamError] = []

    def attempt() -> None:
        try:
            serve(list.copy, "mill", url="redis://127.0.0.1:1")
        except MillstreamError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()

    assert [type(error) for error in errors] == [InvalidRequest]


def test_without_a_server_it_says_so() -> None:
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1"):
        serve(list.copy, "mill", url="redis://127.0.0.1:1")


def test_nothing_else_is_imported_from_the_package() -> None:
    with pytest.raises(ImportError):
        from millstream.worker import serv  # type: ignore[attr-defined]  # noqa: F401
