"""Which runs are worth salvaging; the rest is run by the real Snakefile in tests/workflow/test_bad_input.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice.errors import UserError
from coppice.tracking.salvage import worth_salvaging


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("Error in rule compress:\n", True),
        ("Error in rule compress:\nError in rule track:\n", True),
        ("Error in rule track:\n", False),
        ("Error in rule compress:\nTerminating processes on user request, this might take some time.\n", False),
        ("WorkflowError: something else\n", True),
    ],
)
def test_failures_of_more_than_tracking_are(tmp_path: Path, text: str, worth: bool) -> None:
    log = tmp_path / "snakemake.log"
    log.write_text(text)
    assert worth_salvaging([log]) == worth


def test_a_log_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"The log .*snakemake\.log cannot be read: No such file or directory\."):
        worth_salvaging([tmp_path / "snakemake.log"])
