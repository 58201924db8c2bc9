"""The options with which the tests of all methods run each of them, at the size of tiny models.

Every method that does not train has them in its own test file, `tests/unit/methods/test_<name>.py`, as constants:

- `ROWS`, one for each way through the method; the first is the one that is composed with other methods;
- `CLEARS_UNSEEN_INPUTS = True` where weights of inputs that were zero on every token become zero;
- `BLIND_ROWS`, indices of rows that need statistics for other options and read none themselves.

They are read as literals, so that no test file is imported by another.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "unit" / "methods"


def constants(file: Path) -> dict[str, Any]:
    """The constants of a test file that are literals, by name."""
    values = {}
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name in ("ROWS", "CLEARS_UNSEEN_INPUTS", "BLIND_ROWS"):
                values[name] = ast.literal_eval(statement.value)
    return values


def file_of(method: str) -> Path:
    """The test file of a method."""
    return FOLDER / f"test_{method.replace('-', '_')}.py"


_CONSTANTS = {
    file.stem.removeprefix("test_").replace("_", "-"): found
    for file in sorted(FOLDER.glob("test_*.py"))
    if "ROWS" in (found := constants(file))
}
ROWS: dict[str, list[dict[str, Any]]] = {name: values["ROWS"] for name, values in _CONSTANTS.items()}
CLEARING = {name for name, values in _CONSTANTS.items() if values.get("CLEARS_UNSEEN_INPUTS")}
BLIND = {(name, index) for name, values in _CONSTANTS.items() for index in values.get("BLIND_ROWS", ())}
