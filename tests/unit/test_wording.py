from __future__ import annotations

import pytest

from coppice.formatting import WIDTH, format_table, with_interval


@pytest.mark.parametrize(
    ("value", "ends", "text"),
    [
        (0.7, None, "0.700"),
        (1.8864, (1.8771, 1.8958), "1.89 +- 0.0094"),
        (0.6, (0.5436, 0.6539), "0.600 +- 0.056"),
        (1.0, (0.98736, 1.0), "1.00 [0.987, 1.00]"),
        (299 / 300, (0.98137, 0.99941), "0.997 [0.981, 0.999]"),
        (2.65e-7, (1e-7, 6e-7), "2.65e-07 +- 3.3e-07"),  # ends with exponents are too long for a cell
    ],
)
def test_a_lopsided_interval_shows_its_ends(value: float, ends: tuple[float, float] | None, text: str) -> None:
    assert with_interval(value, ends) == text


def test_intervals_with_a_mark_are_whole_in_a_table_as_wide_as_a_terminal() -> None:
    cell = "0.987 [0.966, 0.995] ~"
    [line] = format_table([["a" * 90, *[cell] * 4]])
    assert line.count(cell) == 4
    assert len(line) == WIDTH
    [line] = format_table([["a" * 90, "1"]])
    assert line == "a" * 39 + "...  1"
