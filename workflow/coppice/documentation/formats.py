"""docs/formats.md: its hand-written parts as they are, and between the markers the records and the tables."""

from __future__ import annotations

from pathlib import Path

from coppice.results.formats import formats_page

PATH = Path("docs/formats.md")


def render(root: Path) -> str:
    """The page, with the hand-written parts of the one in the repository `root`."""
    return formats_page((root / PATH).read_text(encoding="utf-8"))
