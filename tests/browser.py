"""A real Chromium for the tests that need one: the system's, or Playwright's. `make browser` says what is missing."""
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ABSENT = "no Chromium: apt install chromium, or .venv/bin/playwright install --with-deps chromium"


@contextmanager
def chromium():
    "A running browser; the test is skipped, with the reason, where there is none."
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: make browser")
    with api.sync_playwright() as play:
        found = next(filter(None, map(shutil.which, NAMES)), None)
        if not found and not Path(play.chromium.executable_path).exists(): pytest.skip(ABSENT)
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])   # as root in a container
        yield browser
        browser.close()


def complaints(page):
    "What a page says on its console in the way of errors, as it goes on."
    said = []
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    return said
