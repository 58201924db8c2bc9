"""`--step` of `coppice compress` and `coppice recover`: a step as JSON."""

from __future__ import annotations

import argparse
from typing import Any

from coppice.files import json_object

_KEYS = {"name": str, "method": str, "options": dict}
_FORM = (
    """'{"name": "half", "method": "magnitude", "options": {"sparsity": 0.5}}', with the single quotes for the shell"""
)


def parse_step(text: str) -> dict[str, Any]:
    """The step of a command line. Raises argparse's error where it is no JSON, or lacks a key; options are not read."""
    step = json_object(text)
    wrong = [key for key, kind in _KEYS.items() if not isinstance(step.get(key), kind)]
    if wrong:
        problem = "has a wrong value of" if wrong[0] in step else "lacks"
        raise argparse.ArgumentTypeError(f"{text!r} {problem} {wrong[0]!r}; write such as {_FORM}")
    return step
