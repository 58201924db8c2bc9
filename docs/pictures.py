"""The README's picture: the first figure of a study's page, photographed by a headless Chromium.

python docs/pictures.py --report results/demo/report/index.html --output docs/report.png
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

MOST_BYTES = 200_000
WIDTH, HEIGHT, SCALE = 1000, 900, 1.5  # of the window, in pixels of the page; pixels of the picture for one of these

# What a picture does not need: the models and steps stay, as its legend.
LEFT_OUT = """
.controls, #frontier summary, #frontier .quiet, fieldset:nth-of-type(n + 3), .status, .listed, .chosen, figcaption,
#frontier details:last-child, .modebar-container { display: none !important }
#frontier { padding: .5rem 1rem; margin-inline: -1rem } #frontier details { margin: 0 }
"""


def photograph(report: Path, output: Path) -> None:
    """Writes the picture; raises SystemExit with a sentence where something is missing or it is too large."""
    program = shutil.which("chromium")
    if program is None:
        sys.exit("This needs the program chromium (apt-get install chromium).")
    if not report.exists():
        sys.exit(f"There is no page {report}: run `make demo` first, or name another with --report.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE)
        page.goto(report.resolve().as_uri(), timeout=120_000)
        page.add_style_tag(content=LEFT_OUT)
        page.locator("#frontier").screenshot(path=output)
        browser.close()
    if output.stat().st_size > MOST_BYTES:
        sys.exit(f"{output} has {output.stat().st_size} bytes, more than {MOST_BYTES}: lower SCALE.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("results/demo/report/index.html"))
    parser.add_argument("--output", type=Path, default=Path("docs/report.png"))
    arguments = parser.parse_args()
    photograph(arguments.report, arguments.output)


if __name__ == "__main__":
    main()
