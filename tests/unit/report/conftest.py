"""Results of the fake study with their tables, for the tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_results import fake_study, write_results

from coppice.results import collection


def with_tables(folder: Path) -> Path:
    write_results(folder)
    collection.write_tables(fake_study(), folder, folder / "tables", partial=True)
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return with_tables(tmp_path / "demo")


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results that no test changes."""
    return with_tables(tmp_path_factory.mktemp("kept") / "demo")
