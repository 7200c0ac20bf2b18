"""The dashboard on a real server: its actions change what the command line shows, and it comes back with the server."""

from __future__ import annotations

import http.client
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import engines
import pytest
from contracts.queue import Queue, draft
from dashboards import token_of
from starlette.testclient import TestClient
from support import eventually
from workers import spec

from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.deadletters import DeadLetters
from millstream.broker.queue.pause import find_pause
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.gateway.dashboard import actions
from millstream.gateway.dashboard.app import make_app
from millstream.gateway.dashboard.looks import Watcher, see
from millstream.gateway.dashboard.rendering import Renderer
from millstream.gateway.dashboard.server import Server
from millstream.gateway.dashboard.settings import make_settings
from millstream.gateway.dashboard.state import Dashboard
from millstream.gateway.web_server import listen

LOCAL = make_settings("127.0.0.1", has_users=False)


@pytest.fixture
def queue(connection: Connection, service: str) -> Iterator[Queue]:
    """A registered service that nobody serves."""
    Registry(connection).push([spec(service)])
    yield Queue(connection.client, ServiceKeys(service))
    connection.client.srem("ms:services", service)


@pytest.fixture
def browser(connection: Connection) -> TestClient:
    """A browser of a dashboard that looks when it is asked."""
    watcher = Watcher(lambda: see(connection, "ms"))
    dashboard = Dashboard(connection, "ms", LOCAL, watcher, Renderer(connection.safe_url))
    return TestClient(make_app(dashboard), "http://127.0.0.1:8870")


def bury(queue: Queue, *reasons: str) -> list[str]:
    """Buries a job for each reason. Returns the letters' ids, the newest first."""
    for reason in reasons:
        (claim,) = queue.hold("w1", draft())
        queue.settle([claim], bury=reason)
    return [letter.id for letter in letters(queue)]


def letters(queue: Queue) -> DeadLetters:
    return DeadLetters(queue.client, queue.keys)


def submit(browser: TestClient, page: str, **fields: str) -> str:
    """Opens `page`, sends its form with its own fields and these, and returns the page that follows."""
    html = browser.get(page).text
    action = html.split('<form method="post" action="')[1].split('"')[0]
    hidden = {
        name: html.split(f'name="{name}" value="')[1].split('"')[0]
        for name in ("id", "until")
        if f'name="{name}"' in html
    }
    answer = browser.post(action, data={"token": token_of(html), **hidden, **fields})
    assert answer.status_code == 200, answer.text
    return answer.text


# -- pause and resume ------------------------------------------------------------------------------------------------


def test_a_service_is_paused_for_a_while_and_resumed(queue: Queue, browser: TestClient) -> None:
    name = queue.keys.service

    page = submit(browser, f"/services/{name}/pause", **{"for": "5m", "refusing": "yes"})

    pause = find_pause(queue.client, queue.keys)
    assert f"{name} is paused for 300 s, and refuses new jobs." in page
    assert pause
    assert (pause.refusing, pause.left_ms is not None and 0 < pause.left_ms <= 300_000) == (True, True)

    page = submit(browser, f"/services/{name}")

    assert f"{name} is resumed." in page
    assert find_pause(queue.client, queue.keys) is None


def test_the_result_of_an_action_is_shown_once(queue: Queue, browser: TestClient) -> None:
    name = queue.keys.service

    assert f"{name} is paused until it is resumed." in submit(browser, f"/services/{name}/pause")

    assert "is paused until" not in browser.get(f"/services/{name}").text


@pytest.mark.parametrize("time", ["forever", "-5m", "0", "11000d"])
def test_a_pause_of_no_duration_is_refused(queue: Queue, browser: TestClient, time: str) -> None:
    name = queue.keys.service
    token = token_of(browser.get(f"/services/{name}/pause").text)

    answer = browser.post(f"/services/{name}/pause", data={"token": token, "for": time})

    assert answer.status_code == 400
    assert "the duration must be" in answer.text
    assert find_pause(queue.client, queue.keys) is None


@pytest.mark.parametrize("path", ["pause", "resume", "dead/requeue", "dead/purge"])
def test_no_action_creates_a_service(queue: Queue, browser: TestClient, path: str) -> None:
    token = token_of(browser.get(f"/services/{queue.keys.service}/pause").text)

    answer = browser.post(f"/services/no-{queue.keys.service}/{path}", data={"token": token, "until": "1-0"})

    assert answer.status_code == 404
    assert queue.client.keys(f"ms:{{no-{queue.keys.service}}}:*") == []


# -- dead letters ----------------------------------------------------------------------------------------------------


def test_dead_letters_are_shown_without_their_payload_unless_it_is_asked_for(queue: Queue, browser: TestClient) -> None:
    (letter,) = bury(queue, "model_failed: <b>a stone</b>")
    at = f"/services/{queue.keys.service}/dead"

    listed, shown, asked = (browser.get(path).text for path in (at, f"{at}/{letter}", f"{at}/{letter}?payload=true"))

    assert "1 dead letter." in listed
    for page in (listed, shown, asked):
        assert "model_failed: &lt;b&gt;a stone&lt;/b&gt;" in page
    assert "a b c" not in listed + shown
    assert "a b c" in asked


def test_a_page_of_dead_letters_leads_to_the_older_ones(
    queue: Queue, browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millstream.gateway.dashboard.pages.LETTERS", 2)
    bury(queue, "first", "second", "third")
    at = f"/services/{queue.keys.service}/dead"

    newest = browser.get(at).text
    older = browser.get(at + newest.split(f'href="{at}')[-1].split('"')[0]).text

    assert ["first" in newest, "second" in newest, "third" in newest] == [False, True, True]
    assert ["first" in older, "second" in older] == [True, False]


def test_one_dead_letter_is_run_again_after_a_confirmation(queue: Queue, browser: TestClient) -> None:
    newest, older = bury(queue, "first", "second")
    confirm = f"/services/{queue.keys.service}/dead/requeue/confirm?id={older}"

    asked = browser.get(confirm).text
    assert len(letters(queue)) == 2, "to ask changes nothing"
    page = submit(browser, confirm)

    assert "Reason: first" in asked
    assert f"1 dead letter run again: {queue.keys.service}:1x1:" in page
    assert ([letter.id for letter in letters(queue)], queue.depth()) == ([newest], 1)


def test_all_are_run_again_but_those_that_cannot_and_the_page_says_why(queue: Queue, browser: TestClient) -> None:
    bury(queue, "first", "second")
    queue.client.xadd(queue.keys.dead(), {"reason": "malformed"})

    page = submit(browser, f"/services/{queue.keys.service}/dead/requeue/confirm")

    assert "2 dead letters run again. 1 failure: dead letter" in page
    assert [letter.reason for letter in letters(queue)] == ["malformed"]


def test_a_click_runs_a_bounded_number_again(
    queue: Queue, browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "MOST_AT_ONCE", 2)
    bury(queue, "first", "second", "third")

    submit(browser, f"/services/{queue.keys.service}/dead/requeue/confirm")

    assert [letter.reason for letter in letters(queue)] == ["first"]


def test_a_queue_that_is_full_ends_the_run_and_keeps_the_other_letters(queue: Queue, browser: TestClient) -> None:
    bury(queue, "first", "second", "third")
    queue.client.hset(queue.keys.spec(), "max_queue_normal", 1)

    page = submit(browser, f"/services/{queue.keys.service}/dead/requeue/confirm")

    assert "1 dead letter run again" in page
    assert "1 failure:" in page
    assert len(letters(queue)) == 2


@pytest.mark.parametrize("verb", ["purge", "requeue"])
def test_all_are_those_that_the_user_was_asked_about(queue: Queue, browser: TestClient, verb: str) -> None:
    bury(queue, "first", "second")
    at = f"/services/{queue.keys.service}/dead/{verb}"
    html = browser.get(f"{at}/confirm").text
    bury(queue, "arrived later")

    fields = {"token": token_of(html), "until": html.split('name="until" value="')[1].split('"')[0]}
    browser.post(at, data=fields)

    assert [letter.reason for letter in letters(queue)] == ["arrived later"]


def test_one_dead_letter_is_removed(queue: Queue, browser: TestClient) -> None:
    newest, older = bury(queue, "first", "second")

    page = submit(browser, f"/services/{queue.keys.service}/dead/purge/confirm?id={newest}")

    assert "1 dead letter removed." in page
    assert [letter.id for letter in letters(queue)] == [older]


@pytest.mark.parametrize("fields", [{}, {"id": "no id"}, {"until": "*"}, {"until": ""}], ids=str)
def test_a_form_that_names_no_letter_removes_none(queue: Queue, browser: TestClient, fields: dict[str, str]) -> None:
    bury(queue, "first")
    at = f"/services/{queue.keys.service}"
    token = token_of(browser.get(f"{at}/pause").text)

    answer = browser.post(f"{at}/dead/purge", data={"token": token, **fields})

    assert answer.status_code == 400
    assert len(letters(queue)) == 1


# -- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(url: str) -> Iterator[int]:
    """A dashboard with its own thread of looks; its port."""
    with closing(Connection(url)) as connection, listen("127.0.0.1", 0) as listening:
        server = Server(connection, "ms", LOCAL, None)
        thread = threading.Thread(target=server.serve_on, args=(listening,))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.stop()
            thread.join(10)
            assert not thread.is_alive()


def fetch(port: int, path: str = "/") -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_a_server_that_is_away_is_told_and_the_dashboard_comes_back_with_it(
    tmp_path: Path, server_binary: Path
) -> None:
    with EmbeddedServer.start(tmp_path / "data", binary=server_binary, appendfsync="everysec") as server:
        with closing(Connection(server.url)) as connection:
            Registry(connection).push([spec("docs")])
        with serving(server.url) as port:
            eventually(lambda: fetch(port)[0] == 200)

            engines.crash(server)

            eventually(lambda: fetch(port)[0] == 503)
            status, page = fetch(port, "/services/docs/dead")
            assert (status, "cannot be reached" in page) == (503, True)
            assert fetch(port, "/healthz") == (200, "ok\n")
            server.restart()
            eventually(lambda: fetch(port)[0] == 200)
            assert "docs" in fetch(port)[1]


def test_a_server_that_hangs_does_not_hang_the_pages(tmp_path: Path, server_binary: Path) -> None:
    with (
        engines.serving(server_binary, tmp_path) as redis_port,
        closing(Connection(f"redis://127.0.0.1:{redis_port}")) as own,
    ):
        pid = int(own.client.info("server")["process_id"])
        with serving(own.url) as port:
            eventually(lambda: fetch(port)[0] == 200)
            os.kill(pid, signal.SIGSTOP)
            try:
                # Health and the last look are there at once, while a look waits for the server.
                answers = [fetch(port, path)[0] for path in ("/healthz", "/", "/workers") * 5]
            finally:
                os.kill(pid, signal.SIGCONT)

    assert set(answers) <= {200, 503}


def test_a_port_in_use_is_our_error() -> None:
    with listen("127.0.0.1", 0) as listening, pytest.raises(ConfigError, match="choose another --port"):
        listen("127.0.0.1", listening.getsockname()[1])


def test_the_id_of_a_job_that_runs_again_finds_it(queue: Queue, browser: TestClient, server: EmbeddedServer) -> None:
    bury(queue, "first")
    page = submit(browser, f"/services/{queue.keys.service}/dead/requeue/confirm")
    call = page.split("run again: ")[1].split(".<")[0].strip(".")

    with Client(server.url) as client:
        assert client.job(call).done() is False
