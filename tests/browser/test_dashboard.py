"""The dashboard in a real Chromium: it refreshes, fits, stays quiet, is used by keyboard, and runs nobody's script."""

from __future__ import annotations

import os
from pathlib import Path

import engines
import pytest
from browser.chromium import Tab
from browser.staging import Mill
from contracts.queue import draft

PAGES = {
    "services": "",
    "service": "services/embed",
    "workers": "workers",
    "dead": "services/thumbnails/dead",
    "confirm": "services/thumbnails/dead/purge/confirm",
    "pause": "services/embed/pause",
}
PICTURES = os.environ.get("MILLSTREAM_PICTURES", "")
"""Folder for pictures of each page, to be looked at; none are taken if it is empty."""

MOST_BYTES = 200_000
TAB, ENTER = 9, 13


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_its_window_in_both_themes(mill: Mill, tab: Tab, page: str, width: int, theme: str) -> None:
    tab.look_like(width, theme)

    tab.open(mill.url + PAGES[page])

    if page == "service":
        tab.await_true("document.querySelector('figure canvas')")
    assert tab.run("document.documentElement.scrollWidth") <= width
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) is (theme == "dark")
    if PICTURES:
        tab.picture(Path(PICTURES) / f"{page}-{width}-{theme}.png")


def test_the_largest_page_with_all_its_files_is_small(mill: Mill, tab: Tab) -> None:
    tab.command("Network.setCacheDisabled", cacheDisabled=True)
    tab.received.clear()

    tab.open(f"{mill.url}services/embed")
    tab.await_true("document.querySelector('figure canvas')")

    assert 50_000 < sum(tab.received.values()) < MOST_BYTES
    assert all(url.startswith(mill.url) for url in tab.received), "nothing from elsewhere"


def test_the_page_refreshes_itself_and_keeps_the_focus(mill: Mill, tab: Tab) -> None:
    tab.open(mill.url)
    tab.run("document.querySelector('a[href=\"/services/thumbnails/pause\"]').focus()")
    tab.run("void (window.before = document.getElementById('live'))")
    figure = (
        "[...document.querySelectorAll('tr')].find(row => row.textContent.includes('thumbnails')).cells[2].textContent"
    )
    before = int(tab.run(figure))

    mill.thumbnails.put(draft())

    tab.await_true(f"{figure} === '{before + 1}'")
    assert tab.run("document.activeElement.getAttribute('href')") == "/services/thumbnails/pause"
    assert tab.run("window.before === document.getElementById('live')"), "the page was not loaded again"


def test_charts_get_the_next_figures(mill: Mill, tab: Tab) -> None:
    tab.open(f"{mill.url}services/embed")
    length = "document.querySelector('figure').chart?.data[0].length"
    tab.await_true(f"{length} > 0")
    before = tab.run(length)

    tab.await_true(f"{length} > {before}")


def test_a_text_that_tries_to_be_a_script_is_shown_and_does_nothing(mill: Mill, tab: Tab) -> None:
    tab.open(f"{mill.url}services/thumbnails/dead")

    tab.await_true("document.body.textContent.includes('<img src=x onerror=')")
    assert tab.run("document.title") == "Dead letters of thumbnails · millstream"
    assert tab.run("document.querySelectorAll('main img, main script').length") == 0


def test_a_service_is_paused_and_resumed_by_keyboard(mill: Mill, tab: Tab) -> None:
    tab.open(f"{mill.url}services/thumbnails")
    reach(tab, "Pause thumbnails")
    tab.press("Enter", ENTER)
    tab.await_true("location.pathname === '/services/thumbnails/pause' && document.readyState === 'complete'")
    reach(tab, "Pause")
    tab.press("Enter", ENTER)
    tab.await_true("document.body.textContent.includes('thumbnails is paused until it is resumed.')")
    reach(tab, "Resume thumbnails")
    tab.press("Enter", ENTER)

    tab.await_true("document.body.textContent.includes('thumbnails is resumed.')")


def reach(tab: Tab, name: str) -> None:
    """Presses Tab until the element with this name has the focus, which must be visible."""
    for _ in range(40):
        tab.press("Tab", TAB)
        if tab.run("document.activeElement.ariaLabel || document.activeElement.textContent") == name:
            assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            return
    pytest.fail(f"{name} cannot be reached by keyboard")


def test_a_server_that_is_away_is_told_and_the_page_comes_back_by_itself(mill: Mill, tab: Tab) -> None:
    tab.open(mill.url)

    engines.crash(mill.server)
    tab.await_true("document.querySelector('#live .banner.error')?.textContent.includes('cannot be reached')")
    mill.server.restart()

    tab.await_true("document.querySelector('#live table')?.textContent.includes('thumbnails')", within_s=30.0)
    # The browser notes each answer of status 503; that is no problem of the page.
    tab.problems[:] = [each for each in tab.problems if "503" not in each]


def test_a_dashboard_that_is_away_is_told_and_the_page_goes_on_when_it_answers(mill: Mill, tab: Tab) -> None:
    tab.open(mill.url)
    banner = "document.getElementById('away').hidden"

    tab.command("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    tab.await_true(f"{banner} === false")
    tab.command(
        "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )

    tab.await_true(f"{banner} === true")
    # The browser and htmx note each request that fails; that is no problem of the page.
    expected = ("ERR_INTERNET_DISCONNECTED", "Failed to fetch")
    tab.problems[:] = [each for each in tab.problems if not any(text in each for text in expected)]
