from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

# Debian's Chromium, without what it would ask of the network by itself.
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
)  # fmt: skip


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """A headless browser of Playwright's; tests are skipped where Chromium is absent."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs the program chromium (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()
