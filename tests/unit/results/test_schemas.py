from __future__ import annotations

from coppice.records.layout import TABLES
from coppice.results.schemas import SCHEMAS


def test_the_layout_names_the_tables_that_there_are() -> None:
    assert tuple(SCHEMAS) == TABLES
