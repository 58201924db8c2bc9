"""docs/formats.md: its hand-written parts as they are, and between the markers the columns of every table."""

from __future__ import annotations

from pathlib import Path

from coppice.results.schemas import with_tables

PATH = Path("docs/formats.md")


def render(root: Path) -> str:
    """The page, with the hand-written parts of the one in the repository `root`."""
    return with_tables((root / PATH).read_text(encoding="utf-8"))
