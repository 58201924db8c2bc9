from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

# `make test` gives each worker a file at a time, in the order of the tests. The first of these is a chain that keeps
# one core busy for minutes: were it last, the other worker would wait.
LONGEST = (
    "test_interruptions.py", "test_stories.py", "test_composition.py", "test_postgresql.py", "test_storage.py",
    "test_distributed.py", "test_bad_input.py", "test_dag.py",
)  # fmt: skip
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those of many tests, so that workers end together."""
    tests = Counter(item.path for item in items)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), -tests[item.path], item.path))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public models and texts that lie beside the repository; tests that need them are skipped elsewhere."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the public models and texts in ../shared/data")
    return SHARED_DATA
