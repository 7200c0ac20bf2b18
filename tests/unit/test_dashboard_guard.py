"""What the dashboard refuses: addresses, names of hosts, users, pages of other sites; the headers of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from dashboards import DOCS, basic, browser, look, token_of
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from millstream.broker.contract.errors import ConfigError
from millstream.gateway.addresses import LOCAL_NAMES, host_name, is_foreign
from millstream.gateway.dashboard.guard import Guard
from millstream.gateway.dashboard.rendering import Renderer
from millstream.gateway.dashboard.same_origin import COOKIE, Tokens, new_session
from millstream.gateway.dashboard.settings import make_settings
from millstream.gateway.dashboard.users import User, new_line, read_users

PAGES = ("/", "/workers", "/services/docs", "/services/docs/history", "/services/docs/pause")
ACTIONS = (
    "/services/docs/pause",
    "/services/docs/resume",
    "/services/docs/dead/requeue",
    "/services/docs/dead/purge",
)
OPEN = make_settings("0.0.0.0", has_users=True)


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, User]:
    file = tmp_path_factory.mktemp("users") / "users"
    file.write_text(f"{new_line('ada', 'operator', 'password 1')}\n{new_line('bob', 'viewer', 'password 2')}\n")
    file.chmod(0o600)
    return read_users(file)


# -- where it listens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "mill.example.org", "127.0.0.1.example.org", ""])
def test_without_passwords_only_a_loopback_address_is_listened_on(host: str) -> None:
    with pytest.raises(ConfigError, match="without passwords"):
        make_settings(host, has_users=False)

    assert make_settings(host, has_users=True).hosts == frozenset()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_address_needs_no_passwords_but_the_right_name(host: str) -> None:
    assert make_settings(host, has_users=False).hosts == LOCAL_NAMES | {host}


@pytest.mark.parametrize("root_path", ["/services", "/static/x", "queues", "/a//b", "/a b", "/<b>", "/a?b"])
def test_a_root_path_that_cannot_work_is_refused(root_path: str) -> None:
    with pytest.raises(ConfigError, match="--root-path"):
        make_settings("localhost", has_users=False, root_path=root_path)


@pytest.mark.parametrize(
    ("header", "name"),
    [("Localhost:8870", "localhost"), ("127.0.0.1", "127.0.0.1"), ("[::1]:8870", "::1"), ("[::1]", "::1"), ("", ""),
     ("evil.example:80:80", ""), ("[::1]evil", ""), ("localhost:evil", "")],
)  # fmt: skip
def test_the_name_in_a_host_header(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize("path", [*PAGES, "/static/style.css", "/healthz"])
def test_a_name_that_somebody_lets_point_here_is_refused(path: str) -> None:
    answer = browser().get(path, headers={"Host": "rebound.example.org:8870"})

    assert answer.status_code == 421


def test_a_name_that_is_allowed_is_answered() -> None:
    settings = make_settings("127.0.0.1", has_users=False, allowed_hosts=("Mill.example.org",))

    assert browser(settings=settings).get("/", headers={"Host": "mill.example.org"}).status_code == 200
    assert browser(settings=settings).get("/", headers={"Host": "localhost:8870"}).status_code == 200


# -- users -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, "/static/style.css", "/nowhere"])
def test_nothing_is_shown_without_a_password(users: Mapping[str, User], path: str) -> None:
    client = browser(settings=OPEN, users=users)

    answers = [client.get(path), client.get(path, headers=basic("ada", "password 2"))]

    for answer in answers:
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        assert "docs" not in answer.text


def test_health_needs_no_password(users: Mapping[str, User]) -> None:
    assert browser(settings=OPEN, users=users).get("/healthz").text == "ok\n"


def test_many_wrong_passwords_are_answered_without_a_check(
    users: Mapping[str, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(User, "has_password", lambda *_: False)
    client = browser(settings=OPEN, users=users)

    statuses = [client.get("/", headers=basic("ada", f"guess {at}")).status_code for at in range(11)]

    assert statuses == [401] * 10 + [429]


def operator(users: Mapping[str, User]) -> TestClient:
    return browser(settings=OPEN, users=users, headers=basic("ada", "password 1"))


def viewer(users: Mapping[str, User]) -> TestClient:
    return browser(settings=OPEN, users=users, headers=basic("bob", "password 2"))


def test_a_viewer_sees_no_buttons_and_an_operator_does(users: Mapping[str, User]) -> None:
    for path in ("/", "/services/docs"):
        seen, more = viewer(users).get(path), operator(users).get(path)

        assert (seen.status_code, more.status_code) == (200, 200)
        assert "docs" in seen.text
        assert not any(word in seen.text for word in ("<button", "<form", "/pause"))
        assert "/services/docs/pause" in more.text


@pytest.mark.parametrize("path", ACTIONS)
def test_the_server_refuses_a_viewers_actions(users: Mapping[str, User], path: str) -> None:
    token = token_of(operator(users).get("/services/docs/pause").text)

    assert viewer(users).post(path, data={"token": token}).status_code == 403


@pytest.mark.parametrize("path", ["/services/docs/pause", "/services/docs/dead/purge/confirm"])
def test_a_viewer_is_not_asked_for_a_confirmation(users: Mapping[str, User], path: str) -> None:
    assert viewer(users).get(path).status_code == 403


@pytest.mark.parametrize("path", ACTIONS)
def test_read_only_refuses_all_actions(path: str) -> None:
    client = browser(settings=make_settings("127.0.0.1", has_users=False, read_only=True))

    answer = client.post(path)

    assert "/pause" not in client.get("/").text
    assert (answer.status_code, "You may look, but not act." in answer.text) == (403, True)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_a_route_that_is_added_later_is_guarded_too(method: str) -> None:
    async def careless(scope: Scope, receive: Receive, send: Send) -> None:
        pytest.fail("a viewer's action came through")

    settings = make_settings("127.0.0.1", has_users=False, read_only=True)
    client = TestClient(Guard(careless, settings, None, Renderer("redis://h")), "http://localhost")

    assert client.request(method, "/anything").status_code == 403


# -- pages of other sites --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ACTIONS)
def test_an_action_needs_the_token_of_its_browser(path: str) -> None:
    client, other = browser(), browser()
    own, foreign = (token_of(each.get("/services/docs/pause").text) for each in (client, other))

    for token in ("", "0" * 64, foreign, "ü"):
        assert client.post(path, data={"token": token}).status_code == 403
    client.cookies.clear()
    assert client.post(path, data={"token": own}).status_code == 403, "the token without its cookie"


@pytest.mark.parametrize(
    "headers",
    [{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "none"},
     {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1.evil.example"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("path", ACTIONS[:2])
def test_a_request_of_another_sites_page_is_refused_even_with_the_token(path: str, headers: dict[str, str]) -> None:
    client = browser()
    token = token_of(client.get("/services/docs/pause").text)

    answer = client.post(path, data={"token": token}, headers=headers)

    assert (answer.status_code, "another site" in answer.text) == (403, True)


@pytest.mark.parametrize(
    ("fetch_site", "origin", "host", "foreign"),
    [
        ("same-origin", "https://mill.example.org", "127.0.0.1:8870", False),
        ("cross-site", "http://localhost:8870", "localhost:8870", True),
        ("", "http://localhost:8870", "localhost:8870", False),
        ("", "https://mill.example.org", "127.0.0.1:8870", True),
        ("", "https://public.example.org", "127.0.0.1:8870", False),
        ("", "", "localhost:8870", False),
    ],
)
def test_which_requests_are_foreign(fetch_site: str, origin: str, host: str, foreign: bool) -> None:
    assert is_foreign(fetch_site, origin, host, frozenset({"public.example.org"})) is foreign


def test_a_token_is_of_one_process_and_one_session() -> None:
    tokens, session = Tokens(), new_session()

    assert tokens.is_valid(session, tokens.token(session))
    assert not tokens.is_valid(new_session(), tokens.token(session))
    assert not Tokens().is_valid(session, tokens.token(session))
    assert not tokens.is_valid("", tokens.token("")), "no cookie"


def test_the_cookie_is_for_this_site_and_for_no_script() -> None:
    cookie = browser().get("/").headers["Set-Cookie"]

    assert cookie.startswith(f"{COOKIE}=")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie


def test_behind_tls_the_cookie_is_for_tls() -> None:
    client = browser()
    client.base_url = client.base_url.copy_with(scheme="https")

    assert "Secure" in client.get("/").headers["Set-Cookie"]


def test_a_large_body_is_not_read() -> None:
    client = browser()
    token = token_of(client.get("/services/docs/pause").text)

    assert client.post(ACTIONS[0], data={"token": token, "for": "x" * 100_000}).status_code == 413


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [*PAGES, "/nowhere", "/services/none", "/static/style.css", "/static/none", "/healthz"]
)
def test_every_answer_forbids_scripts_frames_and_guesses(path: str) -> None:
    headers = browser().get(path).headers

    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")


def test_pages_are_not_kept_and_files_are() -> None:
    client = browser()

    assert client.get("/").headers["Cache-Control"] == "no-store"
    assert "immutable" in client.get("/static/style.css").headers["Cache-Control"]


def test_a_websocket_is_not_answered() -> None:
    sent: list[object] = []

    async def send(message: object) -> None:
        sent.append(message)

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    asyncio.run(browser(look(DOCS)).app({"type": "websocket", "path": "/"}, receive, send))  # type: ignore[arg-type]

    assert sent == []


# -- behind a proxy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [True, False], ids=["the proxy removes it", "the proxy keeps it"])
@pytest.mark.parametrize("path", ["/", "/services/docs", "/static/style.css"])
def test_under_a_root_path_all_links_have_it(path: str, removed: bool) -> None:
    client = browser(settings=make_settings("127.0.0.1", has_users=False, root_path="/mill/queues/"))

    answer = client.get(path if removed else f"/mill/queues{path}")

    assert answer.status_code == 200
    if "html" in answer.headers["Content-Type"]:
        assert 'href="/mill/queues/workers"' in answer.text
        assert f'hx-get="/mill/queues{path}"' in answer.text
        assert 'href="/services' not in answer.text
        assert 'src="/static' not in answer.text
        assert "Path=/mill/queues;" in answer.headers["Set-Cookie"]


def test_the_root_path_itself_is_the_first_page() -> None:
    client = browser(settings=make_settings("127.0.0.1", has_users=False, root_path="/queues"))

    assert "<h1>Services" in client.get("/queues").text
