"""The files that follow from the code, and whether they are up to date."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coppice.documentation import (
    architecture_page,
    config_page,
    config_schema,
    environment,
    formats,
    laws_page,
    methods_page,
    readme_page,
)
from coppice.files import atomic_write

ROOT = Path(__file__).parents[3]

# Each page from the repository's root, where its hand-written parts are.
PAGES: dict[Path, Callable[[Path], str]] = {
    page.PATH: page.render
    for page in (
        architecture_page,
        config_page,
        config_schema,
        environment,
        formats,
        laws_page,
        methods_page,
        readme_page,
    )
}


def generate() -> dict[Path, str]:
    """The content of each generated file."""
    return {path: render(ROOT) for path, render in PAGES.items()}


def outdated_files(root: Path = ROOT) -> list[Path]:
    """The generated files under `root` that do not hold what they should."""
    return [
        path
        for path, text in generate().items()
        if not (root / path).exists() or (root / path).read_text(encoding="utf-8") != text
    ]


def write_files(root: Path = ROOT) -> None:
    """Writes the generated files under `root`."""
    for path, text in generate().items():
        with atomic_write(root / path) as temporary:
            temporary.write_text(text, encoding="utf-8")
