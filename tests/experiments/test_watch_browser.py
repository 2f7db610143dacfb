"""The page of ``flowerbed watch`` in a real Chromium: it follows runs, obeys the keyboard, and shows text as text."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import NEEDS_BROWSER, Opened, Page, accessibility_issues, chromium
from watched import Asked, line, make_run, scanned, serving

from flowerbed.experiments.watch.index import Index
from flowerbed.server.callbacks import SERVER

pytestmark = NEEDS_BROWSER
__all__ = ["chromium"]

SCHEMES = ("light", "dark")
MARKUP = "<img src=x onerror=alert(1)>"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@dataclass
class Watched:
    """A server over a folder of runs."""

    asked: Asked
    index: Index
    folder: Path

    @property
    def address(self) -> str:
        """What ``flowerbed watch`` prints."""
        return f"http://127.0.0.1:{self.asked.served.server_port}/#token={self.asked.served.token}"

    def opened(self, chromium: Any, **context: Any) -> Opened:
        """Open the list and wait until it is there."""
        found = Opened.new(chromium, **context)
        found.page.goto(self.address)
        found.page.wait_for_selector("#list tbody tr")
        return found


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    folder = tmp_path / "runs"
    done = make_run(folder / "done", rounds=3)
    (done / "figures").mkdir()
    (done / "figures" / "accuracy.png").write_bytes(PIXEL)
    make_run(folder / "other", rounds=2, strategy={"name": "scaffold"})
    make_run(folder / MARKUP, rounds=1)
    make_run(folder / "going on", rounds=2, ended=False)
    found = scanned(folder)
    with serving(found) as asked:
        yield Watched(asked, found, folder)


def names(page: Page) -> list[str]:
    return [text.split(" (")[0] for text in page.locator("#list td.path a").all_text_contents()]


def until(page: Page, condition: str) -> None:
    """Wait for a condition in JavaScript; Playwright's own waiting needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


def nothing_wrong(found: Opened, origin: str) -> None:
    assert found.complaints == []
    assert all(url.startswith((origin, "data:", "blob:")) for url in found.fetched), "asks nobody else"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_list_is_whole_searched_and_sorted_by_keyboard(
    watched: Watched, chromium: Any, scheme: str
) -> None:
    found = watched.opened(chromium, color_scheme=scheme)
    page = found.page
    assert {Path(name).name for name in names(page)} == {"done", "other", MARKUP, "going on"}
    assert "token" not in page.url, "it is not left where others may see it"
    assert accessibility_issues(page) == []

    page.locator("#list th button", has_text="accuracy").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("th[aria-sort] [data-sort=accuracy]:focus")
    first = names(page)
    page.keyboard.press("Enter")
    until(page, f"document.querySelector('#list td.path a').textContent !== {json.dumps(first[0])}")
    assert {first[0], names(page)[0]} == {name for name in first if Path(name).name in ("done", MARKUP)}, (
        "from the least accuracy to the largest, or back"
    )

    page.get_by_label("search").fill("scaffold")
    until(page, "document.querySelectorAll('#list tbody tr').length === 1")
    assert Path(names(page)[0]).name == "other"
    page.get_by_label("search").fill("")
    page.get_by_label("status").select_option("completed")
    until(page, "document.querySelectorAll('#list tbody tr').length === 3")
    nothing_wrong(found, watched.address.partition("/#")[0])
    page.context.close()


def test_a_run_grows_while_it_is_looked_at(watched: Watched, chromium: Any) -> None:
    found = watched.opened(chromium)
    page = found.page
    page.get_by_role("link", name="going on").click()
    page.wait_for_selector("figure svg .line")
    chart = page.locator("figure", has=page.locator("figcaption", has_text="accuracy")).locator("svg").first
    assert "1 to 2" in chart.get_attribute("aria-label")
    with open(watched.folder / "going on" / "metrics.jsonl", "a") as file:
        file.write(line(3, loss=0.1) + line(3, SERVER, accuracy=0.9, loss=0.2))
    until(page, "document.querySelector('figure svg').getAttribute('aria-label').includes('1 to 3')")
    # Round by round with the keyboard.
    chart.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    reading = page.locator("figure .reading").first.text_content()
    assert reading.startswith("round 2")
    assert "0.2" in reading
    nothing_wrong(found, watched.address.partition("/#")[0])
    page.context.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_is_shown_with_pictures_and_is_fit_for_a_phone(
    watched: Watched, chromium: Any, scheme: str
) -> None:
    found = watched.opened(
        chromium, color_scheme=scheme, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True
    )
    page = found.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("link", name="done").click()
    until(page, "document.querySelector('.pictures img')?.naturalWidth === 1")
    for fold in page.locator("details").all():
        fold.locator("summary").click()
    assert "fedavg" in page.locator("details[data-name='config.yaml'] pre").text_content()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert accessibility_issues(page) == []
    nothing_wrong(found, watched.address.partition("/#")[0])
    page.context.close()


def test_what_runs_are_called_is_text(watched: Watched, chromium: Any) -> None:
    found = watched.opened(chromium)
    page = found.page
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    page.get_by_role("link", name=MARKUP).click()
    page.wait_for_selector("h2")
    assert MARKUP in page.locator("h2").text_content()
    assert page.locator("main img").count() == 0
    assert alerts == []
    page.context.close()


def test_a_page_survives_a_reload_and_says_without_a_token_what_it_needs(
    watched: Watched, chromium: Any
) -> None:
    found = watched.opened(chromium)
    found.page.reload()
    found.page.wait_for_selector("#list tbody tr")
    found.page.context.close()
    stranger = Opened.new(chromium)
    stranger.page.goto(watched.address.partition("#")[0])
    until(stranger.page, "document.getElementById('main').textContent.includes('token')")
    assert stranger.page.locator("#list").count() == 0
    stranger.page.context.close()


def test_it_says_when_the_server_has_gone_and_goes_on_when_it_is_back(
    watched: Watched, chromium: Any, tmp_path: Path
) -> None:
    found = watched.opened(chromium)
    page = found.page
    until(page, "document.getElementById('connection').textContent === 'live'")
    page.context.set_offline(True)
    page.evaluate("view.abort(); route()")
    until(page, "document.getElementById('connection').classList.contains('lost')")
    assert "Trying again" in page.locator("#connection").text_content()
    page.context.set_offline(False)
    until(page, "document.getElementById('connection').textContent === 'live'")
    page.context.close()
