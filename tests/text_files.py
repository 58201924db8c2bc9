"""Text files for tests, and a checkpoint's files that tokenizing reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORDS = [f"w{i}" for i in range(40)]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def jsonl(path: Path, documents: Iterable[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: document}) + "\n" for document in documents))
    return path


def source(path: Path, role: str = "evaluation", **keys: Any) -> dict[str, Any]:
    """A text of one file, all of it for one role."""
    return {"path": str(path), "splits": {role: 1}, **keys}
