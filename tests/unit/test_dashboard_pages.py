"""What the dashboard's pages say, without a server: figures, warnings, errors, and texts that try to be HTML."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from dashboards import DOCS, WORKER, browser, look, supervisor
from support import eventually

from millstream.broker.contract.errors import BrokerUnavailable
from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.deadletters import Letter
from millstream.broker.queue.diagnosis import Finding
from millstream.broker.queue.metrics import decode_metrics
from millstream.broker.queue.pause import Pause
from millstream.gateway.dashboard.badges import badges
from millstream.gateway.dashboard.history import History
from millstream.gateway.dashboard.looks import Look, Sight, Watcher
from millstream.gateway.dashboard.rendering import Renderer

STATIC = Path(str(resources.files("millstream.gateway.dashboard"))) / "static"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
DOWN = Look(1_700_000_000.0, None, "Redis at redis://h cannot be reached (start one)")


def texts(html: str) -> str:
    """The text of a page, without tags."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_the_first_page_shows_each_services_figures() -> None:
    text = texts(browser(look(DOCS)).get("/").text)

    assert "docs" in text
    assert "4 0 0 3 1 9.5s 12s 33 4.5ms 1.2s 1 7 2 Pause" in text


def test_the_first_page_shows_what_doctor_finds() -> None:
    page = browser(look(replace(DOCS, workers=[], held={}))).get("/").text

    assert "no worker lives: 5 jobs waiting" in page
    assert "<code>millstream worker run docs</code>" in page
    assert re.search(r'class="tag error" title="[^"]*">no worker</span>', page), "a badge beside the service"


def test_a_server_without_trouble_says_so() -> None:
    assert "No trouble found." in browser(look(replace(DOCS, dead_letters=0))).get("/").text


def test_live_batches_are_listed() -> None:
    idle = replace(WORKER, consumer="idle-1", running=0)

    batches = texts(browser(look(replace(DOCS, workers=[WORKER, idle]))).get("/").text.split("Batches that run")[1])

    assert "docs w1 3 1.5s" in batches
    assert "idle-1" not in batches


def test_the_workers_page_shows_what_they_run_and_how_those_before_them_died() -> None:
    view = replace(DOCS, supervisors=[supervisor("ended with exit code 7")])

    text = texts(browser(look(view)).get("/workers").text)

    assert "w1 docs ready cuda:0 3 jobs for 1.5s 8.0 50% 1.10 10 1 310 MB 2 5.0s was killed by SIGKILL" in text
    assert "h:7 docs lives 1 of 2 4 ended with exit code 7" in text


def test_a_paused_service_can_be_resumed_and_another_one_paused() -> None:
    client = browser(look(DOCS, replace(DOCS, name="other", paused=Pause())))

    page = client.get("/").text

    assert 'href="/services/docs/pause"' in page
    assert 'action="/services/other/resume"' in page
    assert 'action="/services/docs/resume"' not in page


@pytest.mark.parametrize("path", ["/", "/workers", "/services/docs"])
def test_a_server_that_is_away_is_told_with_503_and_the_page_asks_again(path: str) -> None:
    answer = browser(DOWN).get(path)

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert "Redis at redis://h cannot be reached (start one)" in answer.text
    assert f'hx-get="{path}"' in answer.text


def test_a_service_that_is_not_there_is_not_found() -> None:
    answer = browser().get("/services/none")

    assert answer.status_code == 404
    assert "no service &#39;none&#39; here" in answer.text
    assert "hx-get" not in answer.text


@pytest.mark.parametrize("path", ["/", "/workers", "/services/docs"])
def test_texts_of_others_stay_texts(path: str) -> None:
    worker = replace(WORKER, consumer=HOSTILE, state=HOSTILE, device=HOSTILE, past=HOSTILE)
    view = replace(DOCS, workers=[worker], refused={HOSTILE: 1}, supervisors=[supervisor(HOSTILE)])
    hostile = replace(view, name=HOSTILE)
    finding = Finding("error", "docs", "paused", HOSTILE, HOSTILE)

    page = browser(look(view, hostile, findings=[finding, replace(finding, service=HOSTILE)])).get(path).text

    assert "&lt;script&gt;alert(1)" in page
    assert inert(page)


def test_the_text_of_an_error_stays_text() -> None:
    assert inert(browser(replace(DOWN, error=HOSTILE)).get("/").text)
    assert inert(browser().get("/services/%3Cscript%3Ealert(1)%3C%2Fscript%3E").text)
    assert inert(browser().get("/?<script>alert(1)</script>").text)


def test_dead_letters_stay_text() -> None:
    fields = {HOSTILE.encode(): HOSTILE.encode(), b"rows": HOSTILE.encode()}
    letter = Letter("1-0", HOSTILE, HOSTILE, None, Priority.NORMAL, None, HOSTILE, [HOSTILE], fields)
    renderer = Renderer(HOSTILE)
    known = {"may_act": True, "token": "t", "path": "/", "service": "docs", "letter": letter, "view": DOCS}

    pages = [
        renderer.page("letter.html", fields=letter.texts(), payload=HOSTILE, **known),
        renderer.page("dead.html", letters=[letter], total=1, before=None, older="", notice=HOSTILE, **known),
        renderer.page("confirm.html", verb="purge", letter_id="1-0", newest=letter, total=1, **known),
    ]

    assert all(inert(page) for page in pages)


class Elements(HTMLParser):
    """The elements of a page as a browser understands it, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def inert(page: str) -> bool:
    """Whether the page has no other script than the dashboard's own, no image and no handler."""
    elements = Elements(page).found
    scripts = [attributes.get("src") or "" for tag, attributes in elements if tag == "script"]
    ours = all(re.fullmatch(r"/static/[\w.-]+\?[0-9a-f]{12}", each) for each in scripts)
    handlers = [name for _, attributes in elements for name in attributes if name.startswith("on")]
    return ours and len(scripts) == 3 and not handlers and "img" not in [tag for tag, _ in elements]


def test_what_is_not_inert_is_noticed() -> None:
    page = browser().get("/").text

    assert inert(page)
    assert not inert(page.replace("<h1>", f"<h1>{HOSTILE}"))
    assert not inert(page.replace("<h1>", "<h1 onclick=alert(1)>"))


def test_a_page_has_nothing_inline() -> None:
    """Its policy forbids inline scripts and styles, so one would be an error in the console."""
    for path in ("/", "/workers", "/services/docs", "/services/docs/pause"):
        page = browser().get(path).text

        assert not re.search(r"<style|\sstyle=|\son\w+=", page)


def test_an_invalid_query_is_an_error_page() -> None:
    answer = browser().get("/services/docs/dead/1-0?payload=perhaps")

    assert (answer.status_code, "The request is not valid." in answer.text) == (400, True)


def test_badges_are_one_for_each_cause() -> None:
    findings = [Finding("error", "docs", "crash_loop", f"place {at}", "") for at in range(3)]
    findings += [Finding("note", "docs", "dead_letters", "", ""), Finding("error", "other", "paused", "", "")]

    assert badges(findings, "docs") == [("error", "workers crash", "place 0")]


# -- files -----------------------------------------------------------------------------------------------------------


def test_vendored_files_are_those_that_were_checked_and_have_their_licence() -> None:
    lines = [line.split("  ") for line in (STATIC / "VENDORED.sha256").read_text().splitlines()]
    listed = {name: digest for digest, name in lines}

    vendored = {path.name: path for path in STATIC.iterdir() if re.search(r"-\d", path.name)}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in vendored.items()} == listed
    for script in (name for name in vendored if name.endswith(".js")):
        assert script.replace(".min.js", ".LICENSE") in vendored


def test_a_file_is_named_with_its_digest() -> None:
    page = browser().get("/").text

    digest = hashlib.sha256((STATIC / "style.css").read_bytes()).hexdigest()[:12]
    assert f"/static/style.css?{digest}" in page


# -- looks and history -----------------------------------------------------------------------------------------------


def sight(**counts: int) -> Sight:
    """What a look reads of the service docs, with these totals."""
    found = look(DOCS).found
    assert found
    fields = {name.replace("__", ":").encode(): str(count).encode() for name, count in counts.items()}
    return Sight(found, {"docs": decode_metrics(ServiceKeys("docs"), fields)})


def test_a_look_that_fails_says_why_and_the_next_one_may_succeed() -> None:
    answers = iter([BrokerUnavailable("away"), KeyError("odd"), None])

    def see() -> Sight:
        if error := next(answers):
            raise error
        return sight()

    watcher = Watcher(see)

    assert (watcher.last().found, watcher.last().error) == (None, "away")
    assert "internal error: KeyError" in watcher.again().error
    assert watcher.again().found is not None
    assert watcher.last().error == ""


def test_the_watcher_looks_again_and_again_until_it_is_ended() -> None:
    looked = threading.Semaphore(0)

    def see() -> Sight:
        looked.release()
        raise BrokerUnavailable("away")

    watcher = Watcher(see, every_s=0.001)
    watcher.start()

    assert all(looked.acquire(timeout=10) for _ in range(3))
    watcher.end()
    eventually(lambda: not watcher.is_alive())


def test_rates_and_latencies_are_those_between_two_looks() -> None:
    sights = iter([sight(settled=100, work__rows=1_000, total__realtime__5=90),
                   sight(settled=120, work__rows=1_400, total__realtime__5=90, total__normal__250=10)])  # fmt: skip
    times = iter([10.0, 12.0])
    watcher = Watcher(lambda: next(sights), now=lambda: next(times))

    first, second = watcher.again().traffic["docs"], watcher.again().traffic["docs"]

    assert (first.jobs_per_s, first.p50_ms) == (None, None)
    assert first.backlog_s == 5 * 2.5 / 10, "5 jobs wait, and the worker took 2.5 s for 10 jobs"
    assert (second.jobs_per_s, second.rows_per_s) == (10.0, 200.0)
    assert 100 < (second.p50_ms or 0) < (second.p95_ms or 0) <= 250, "no job of before the first look"


def test_after_a_time_without_the_server_rates_begin_again() -> None:
    answers = iter([sight(settled=100), None, sight(settled=900)])

    def see() -> Sight:
        if found := next(answers):
            return found
        raise BrokerUnavailable("away")

    watcher = Watcher(see)
    watcher.again()
    watcher.again()

    assert watcher.again().traffic["docs"].jobs_per_s is None


def test_the_history_of_a_service_is_its_charts_data() -> None:
    client = browser()

    answer = client.get("/services/docs/history").json()

    assert answer["names"] == ["waiting", "in_flight", "rows_per_s", "p50_ms", "p95_ms"]
    assert answer["series"] == [[]] * 6


def test_history_is_bounded_and_forgets_services_that_are_gone() -> None:
    history = History(most_samples=3, most_services=2)

    for at in range(5):
        history.add(float(at), [("b", {"waiting": at}), ("a", {"waiting": 1.0}), ("c", {"waiting": 1.0})])

    assert history.series("b", ["waiting", "none"]) == [[2.0, 3.0, 4.0], [2, 3, 4], [None, None, None]]
    assert history.series("c", ["waiting"]) == [[], []]
    history.add(5.0, [("a", {"waiting": 1.0})])
    assert history.series("b", ["waiting"]) == [[], []]
