"""Pages in a real headless Chromium, where there is one."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
_MISSING = [
    name for name in ("playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None
]
NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None or bool(_MISSING),
    reason=f"needs {' and '.join(_MISSING)}: pip install 'flowerbed[dev]'"
    if _MISSING
    else "there is no chromium; on Debian: apt-get install chromium",
)
SERIOUS = ("serious", "critical")
Page = Any


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        # Chromium refuses to sandbox what root starts.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and what its browser complained of or asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    @classmethod
    def new(cls, chromium: Any, **context: Any) -> Self:
        """Return an empty page in a context of its own."""
        page = chromium.new_context(**{"viewport": {"width": 1300, "height": 900}, **context}).new_page()
        found = cls(page)
        page.on(
            "console", lambda m: found.complaints.append(m.text) if m.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda e: found.complaints.append(str(e)))
        page.on("request", lambda r: found.fetched.append(r.url))
        return found


def accessibility_issues(page: Page) -> list[tuple[str, str]]:
    """Return rule and element of every issue that axe calls serious."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [(i["id"], i["nodes"][0]["html"][:300]) for i in found if i["impact"] in SERIOUS]
