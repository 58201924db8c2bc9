"""The files that a file rests on, by its imports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from coppice.records.source_files import imported_files

LILY = ["__init__.py", "alone.py", "beds/__init__.py", "beds/rose.py", "soil.py", "tools/__init__.py", "tools/rake.py"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `garden` whose modules import one another in every way that Python has."""
    files = {
        "__init__.py": "",
        "alone.py": "import json\n",
        "beds/__init__.py": "from garden.soil import depth\n",
        "beds/rose.py": "from garden import (\n    alone,  # a comment\n    soil,\n)\n",
        "beds/lily.py": "from . import rose\nfrom ..tools.rake import teeth\n",
        "cycle.py": "from garden import cycle\nimport garden.tools.rake\n",
        "late.py": "def dig():\n    from garden.tools import (\n        rake,\n    )\n",
        "soil.py": "depth = 1\n",
        "tools/__init__.py": "",
        "tools/rake.py": "teeth = 2\n",
    }
    for name, text in files.items():
        path = tmp_path / "garden" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "garden"
    for name in [name for name in sys.modules if name.partition(".")[0] == "garden"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("alone.py", []),
        ("beds/rose.py", ["__init__.py", "alone.py", "soil.py"]),
        (
            "beds/lily.py",
            [
                "__init__.py",
                "alone.py",
                "beds/__init__.py",
                "beds/rose.py",
                "soil.py",
                "tools/__init__.py",
                "tools/rake.py",
            ],
        ),
        ("cycle.py", ["__init__.py", "tools/__init__.py", "tools/rake.py"]),
        ("late.py", ["__init__.py", "tools/__init__.py", "tools/rake.py"]),
    ],
)
def test_imports_are_followed(package: Path, file: str, expected: list[str]) -> None:
    reached = imported_files(package / file, "garden")
    assert [path.relative_to(package).as_posix() for path in reached] == expected


def test_a_file_outside_the_package_may_import_it(package: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from garden.tools import (\n    rake,\n)\nimport numpy\nfrom . import soil\n", encoding="utf-8")
    assert [path.name for path in imported_files(script, "garden.tools")] == ["__init__.py", "rake.py"]
    assert imported_files(script, "no_such_package") == []
