"""Webhooks, without a server: which URLs are allowed, how an announcement is signed, which ones are sent when."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.config.webhooks import WebhookSettings, read_secrets
from millstream.broker.contract.errors import ConfigError, InvalidRequest, Malformed
from millstream.broker.contract.webhook_urls import is_allowed, read_webhook_url
from millstream.broker.contract.webhooks import (
    ATTEMPT_S,
    CONNECT_S,
    FIRST_RETRY_S,
    LONGEST_RETRY_S,
    MOST_ATTEMPTS,
    MOST_PER_ORIGIN,
    Announcement,
    choose,
    retry_after_s,
)
from millstream.client.call_options import check_webhook
from millstream.client.testing import FakeClient
from millstream.client.webhooks import SIGNATURE_HEADER, verify
from millstream.worker.supervision.webhook_sender import sending

SECRET, NEXT = "a secret of many letters", "another secret of letters"
ALLOWED = ["https://hooks.example.com/mill/", "http://127.0.0.1:8080", "https://exact.example.com/hook"]
CALL = "0123456789abcdef" * 2


def announcement(url: str = "https://hooks.example.com/mill/a?b=c", number: int = 0, failed: int = 0) -> Announcement:
    fields = {b"call": CALL.encode(), b"payload": f"4x2  {url}".encode(), b"failed": str(failed).encode()}
    return Announcement.of("embed", f"1700000000123-{number}", fields)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/mill/",
        "https://hooks.example.com/mill/a?token=%2e%2e/#".rstrip("#"),
        "https://hooks.example.com:443/mill/a%20b",
        "HTTPS://Hooks.Example.COM/mill/a",
        "http://127.0.0.1:8080",
        "http://127.0.0.1:8080/any/where",
        "https://exact.example.com/hook",
        "https://exact.example.com/hook/below",
        "https://exact.example.com/hook?a=b",
    ],
)
def test_a_url_below_an_allowed_prefix_is_allowed(url: str) -> None:
    assert is_allowed(read_webhook_url(url), ALLOWED)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/",
        "https://hooks.example.com/mill",
        "https://hooks.example.com/MILL/a",
        "http://hooks.example.com/mill/a",
        "https://hooks.example.com:8443/mill/a",
        "https://hooks.example.com.evil.com/mill/a",
        "https://evil.com/https://hooks.example.com/mill/a".replace("//h", "/h"),
        "https://evil.com/?https://hooks.example.com/mill/",
        "https://evilhooks.example.com/mill/a",
        "http://127.0.0.1/a",
        "http://127.1:8080/a",
        "http://2130706433:8080/a",
        "http://[::ffff:127.0.0.1]:8080/a",
        "http://localhost:8080/a",
        "https://exact.example.com/hooks",
        "https://exact.example.com/hook%3f",
    ],
)
def test_a_url_elsewhere_is_not_allowed(url: str) -> None:
    assert not is_allowed(read_webhook_url(url), ALLOWED)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.com/mill/",
        "//hooks.example.com/mill/",
        "https:hooks.example.com/mill/",
        "https:/hooks.example.com/mill/",
        "file:///etc/passwd",
        "gopher://hooks.example.com/mill/",
        "https://",
        "https:///mill/",
        "https://user@hooks.example.com/mill/",
        "https://hooks.example.com@evil.com/mill/",
        "https://hooks.example.com:pw@evil.com/mill/",
        "https://evil.com\\@hooks.example.com/mill/",
        "https://hooks.example.com\\.evil.com/mill/",
        "https://hooks.example.com/mill/#a",
        "https://hooks.example.com/mill/../admin",
        "https://hooks.example.com/mill/%2e%2e/admin",
        "https://hooks.example.com/mill/.%2E/admin",
        "https://hooks.example.com/mill/..;/admin",
        "https://hooks.example.com/mill/..%2fadmin",
        "https://hooks.example.com/mill/..%5cadmin",
        "https://hooks.example.com/mill/%252e%252e/admin",
        "https://hooks.example.com/mill//a",
        "https://hooks.example.com/mill/a b",
        "https://hooks.example.com/mill/a\r\nHost: evil.com",
        "https://hooks.example.com/mill/%0d%0aHost:%20evil.com",
        "https://hooks.example.com/mill/\t",
        "https://hooks.example.com:0/mill/",
        "https://hooks.example.com:99999/mill/",
        "https://hooks.example.com:a/mill/",
        "https://hooks.example.com./mill/",
        "https://hooks%2eexample.com/mill/",
        "https://h\u00f6oks.example.com/mill/",
        "https://hooks.example.com/mill/" + "a" * 2_048,
    ],
)
def test_a_url_that_could_be_read_in_two_ways_is_no_webhook(url: str) -> None:
    with pytest.raises(ValueError, match="must"):
        read_webhook_url(url)


def spec(*allowed: str) -> ServiceSpec:
    return ServiceSpec(
        name="embed", model=ModelSpec(type="echo"), model_ref="m", runtime=Runtime(), webhooks=tuple(allowed)
    )


def test_a_record_without_webhooks_is_as_older_versions_wrote_it() -> None:
    assert "webhooks" not in spec().to_json()
    assert ServiceSpec.from_json(spec(*ALLOWED).to_json()).webhooks == tuple(ALLOWED)


@pytest.mark.parametrize("webhook", ["https://evil.com/", "no URL", "https://a@hooks.example.com/mill/", 5])
def test_a_webhook_that_is_not_allowed_is_refused_when_it_is_submitted(webhook: str) -> None:
    with pytest.raises(InvalidRequest, match="webhook"):
        check_webhook(spec(*ALLOWED), webhook)


def test_a_fake_client_takes_any_webhook_that_is_a_url() -> None:
    with FakeClient() as client:
        client.submit_detached("embed", ["a"], webhook="https://any.example.com/")
        with pytest.raises(InvalidRequest):
            client.submit_detached("embed", ["a"], webhook="no URL")


def test_the_origin_names_the_receiver_without_what_may_be_a_token() -> None:
    assert read_webhook_url("https://h.example.com/token?a=secret").origin == "https://h.example.com"
    assert read_webhook_url("http://[::1]:8080/token").origin == "http://[::1]:8080"


def test_a_body_says_how_the_call_ended_and_holds_no_results() -> None:
    assert json.loads(announcement(failed=1).body()) == {
        "id": f"embed:4x2:{CALL}",
        "service": "embed",
        "state": "partly_failed",
        "rows": 4,
        "failed": 1,
        "finished_at": "2023-11-14T22:13:20.123Z",
    }
    assert [announcement(failed=count).state for count in (0, 4)] == ["done", "failed"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"call": b"a:b", b"payload": b"4x2  https://h/", b"failed": b"0"},
        {b"call": CALL.encode(), b"payload": b"4x2 ", b"failed": b"0"},
        {b"call": CALL.encode(), b"payload": b"4x2  https://u@h/", b"failed": b"0"},
        {b"call": CALL.encode(), b"payload": b"4x2  https://h/", b"failed": b"-1"},
    ],
)
def test_an_entry_that_no_script_wrote_is_no_announcement(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(Malformed):
        Announcement.of("embed", "1-0", fields)


def test_a_signature_is_the_one_of_the_scheme() -> None:
    body = announcement().body()
    expected = hmac.new(SECRET.encode(), b"1700000000." + body, hashlib.sha256).hexdigest()

    headers = announcement().headers(body, [SECRET], 1_700_000_000)

    assert headers[SIGNATURE_HEADER] == f"t=1700000000,v1={expected}"
    assert headers["X-Millstream-Timestamp"] == "1700000000"
    assert headers["X-Millstream-Id"] == f"{CALL}-1700000000123-0"


def test_a_receiver_verifies_what_was_signed_and_reads_it() -> None:
    body = announcement().body()
    headers = announcement().headers(body, [SECRET], int(time.time()))

    outcome = verify({name.lower(): value for name, value in headers.items()}, body, SECRET)

    assert (outcome.id, outcome.state, outcome.rows, outcome.failed) == (f"embed:4x2:{CALL}", "done", 4, 0)


def test_while_a_secret_is_replaced_the_old_and_the_new_one_verify() -> None:
    body = announcement().body()
    headers = announcement().headers(body, [SECRET, NEXT], int(time.time()))

    assert verify(headers, body, SECRET) == verify(headers, body, NEXT)


def test_a_receiver_trusts_nothing_else() -> None:
    body, now = announcement().body(), int(time.time())
    headers = announcement().headers(body, [SECRET], now)
    signature = headers[SIGNATURE_HEADER]
    digest = signature.partition("v1=")[2]

    for forged, content, secret in [
        ({}, body, SECRET),
        (headers, body + b" ", SECRET),
        (headers, body, NEXT),
        ({SIGNATURE_HEADER: f"t={now + 1},v1={digest}"}, body, SECRET),
        ({SIGNATURE_HEADER: f"t={now},t={now + 1},v1={digest}"}, body, SECRET),
        ({SIGNATURE_HEADER: f"v1={digest}"}, body, SECRET),
        ({SIGNATURE_HEADER: f"t={now},v0={digest}"}, body, SECRET),
        ({SIGNATURE_HEADER: f"t={now},v1="}, body, SECRET),
        ({SIGNATURE_HEADER: f"t={now},v1=\u00e9"}, body, SECRET),
        (announcement().headers(body, [SECRET], now - 400), body, SECRET),
        (announcement().headers(body, [SECRET], now + 400), body, SECRET),
    ]:
        with pytest.raises(InvalidRequest, match="not an announcement to trust"):
            verify(forged, content, secret)
    assert verify(announcement().headers(body, [SECRET], now - 400), body, SECRET, tolerance_s=500)


def test_retries_come_later_and_later_up_to_a_bound_and_never_beside_an_attempt() -> None:
    times = [retry_after_s(attempts) for attempts in range(1, 40)]

    assert times[0] == FIRST_RETRY_S > ATTEMPT_S + 3 * CONNECT_S
    assert all(later == min(2 * earlier, LONGEST_RETRY_S) for earlier, later in pairwise(times))
    assert retry_after_s(10**6) == LONGEST_RETRY_S


def test_one_receiver_leaves_room_for_the_others() -> None:
    hanging = [announcement("https://hangs.example.com/", number) for number in range(100)]
    other = announcement("https://hooks.example.com/", 100)

    first = choose([*hanging, other], [])
    assert first == [*hanging[:MOST_PER_ORIGIN], other]
    assert choose(hanging[MOST_PER_ORIGIN:], first) == []


def test_attempts_at_the_same_time_are_bounded() -> None:
    many = [announcement(f"https://h{number}.example.com/", number) for number in range(100)]

    assert choose(many, []) == many[:MOST_ATTEMPTS]
    assert choose(many[MOST_ATTEMPTS:], [replace(each) for each in many[:MOST_ATTEMPTS]]) == []


def test_secrets_are_the_lines_of_their_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n\n  {NEXT}\n")

    assert read_secrets(file) == [SECRET, NEXT]


@pytest.mark.parametrize("content", ["", "\n", "short", f"{SECRET}\nshort", f"{SECRET}\n" * 5])
def test_a_file_without_a_valid_secret_is_refused_and_not_quoted(tmp_path: Path, content: str) -> None:
    file = tmp_path / "secret"
    file.write_text(content)

    with pytest.raises(ConfigError, match="openssl rand") as caught:
        read_secrets(file)
    assert SECRET not in str(caught.value)


def test_a_host_whose_secret_is_missing_does_not_start(tmp_path: Path) -> None:
    settings = WebhookSettings(allow=("https://h.example.com/",), secret_file=tmp_path / "missing")

    with pytest.raises(ConfigError, match="cannot be read"), sending("redis://127.0.0.1:1", "ms", ["embed"], settings):
        raise AssertionError("it began to send")
