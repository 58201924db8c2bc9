"""The registry: names, laws of other packages, and the files that a law rests on."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from coppice.errors import UserError
from coppice.laws import p2, registry
from coppice.laws.contracts import find_problems

PLUGIN = """
from dataclasses import replace

from coppice.laws import (
    p2,
    sparsity,
)

LAW = replace(p2.LAW, points_are="they are of another package.")
OTHER = type("Other", (), {"LAW": sparsity.LAW})
POINTLESS = type("Pointless", (), {"LAW": replace(p2.LAW, points=3, axis="tokens")})
EMPTY = type("Empty", (), {})
"""


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs entry points of a package `forestry`, given as name=value."""
    (tmp_path / "forestry").mkdir()
    (tmp_path / "forestry" / "__init__.py").write_text("")
    (tmp_path / "forestry" / "growth.py").write_text("from forestry import rings\n" + PLUGIN)
    (tmp_path / "forestry" / "rings.py").write_text("")
    (tmp_path / "forestry" / "broken.py").write_text(
        "from coppice.laws.contracts import Law\nLAW = Law(axis=('a', 'b'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def install(**values: str) -> Path:
        given = [EntryPoint(name.replace("_", "-"), value, "coppice.laws") for name, value in values.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: given if group == "coppice.laws" else [])
        registry.laws.cache_clear()
        registry.source_files.cache_clear()
        return tmp_path / "forestry"

    yield install
    registry.laws.cache_clear()
    registry.source_files.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "forestry"]:
        del sys.modules[name]


def test_laws_are_found_by_name() -> None:
    assert {"p2", "k-bit", "learning-curve"} < set(registry.names())
    assert not {"engine", "points", "stage"} & set(registry.names())
    assert registry.load("p2").source["arxiv"] == "2411.10272"
    with pytest.raises(UserError, match=r"no law named 'p3'. Did you mean 'p2'\?$"):
        registry.load("p3")


def test_an_unknown_law_lists_each_law_once() -> None:
    with pytest.raises(UserError) as refused:
        registry.load("zz")
    assert str(refused.value).count("chinchilla") == 1


def test_a_law_of_another_package_is_found_by_its_entry_point(plug_in) -> None:
    folder = plug_in(growth="forestry.growth", girth="forestry.growth:OTHER")
    assert registry.load("growth").points_are == "they are of another package."
    assert registry.names() == tuple(sorted(registry.names()))
    assert registry.validate_options("girth", {"starts": 3}).starts == 3
    rests_on = registry.source_files("growth")
    assert {folder / "growth.py", folder / "rings.py", Path(p2.__file__)} <= set(rests_on)
    assert registry.find("girth").file == folder / "growth.py"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"growth": "forestry.growth:POINTLESS"},
            "Law 'growth' (module forestry.growth): `axis` is not a tuple of a column and its label; `points` is not a "
            "function.",
        ),
        ({"growth": "forestry.growth:EMPTY"}, "Law 'growth' (module forestry.growth): it defines no `LAW`."),
        ({"growth": "forestry.nowhere"}, "Law 'growth' (forestry.nowhere) cannot be loaded: ModuleNotFoundError: No "),
        ({"growth": "forestry.broken"}, "missing 7 required keyword-only arguments: 'source', 'units', "),
        ({"p2": "forestry.growth"}, "Two laws are named 'p2': coppice.laws.p2 and forestry.growth; rename the entry"),
    ],
)
def test_a_law_that_cannot_be_used_is_refused_by_name(plug_in, values: dict[str, str], sentence: str) -> None:
    plug_in(**values)
    with pytest.raises(UserError) as refused:
        registry.names()
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("source", {"title": "A"}, "`source` does not map title, arxiv and equation to texts"),
        ("units", ["nats"], "`units` does not map columns to texts"),
        ("columns", {"run": str, "loss": int}, "`columns` does not map columns to `str` or `float`"),
        ("columns", {"run": float, "tokens": float, "loss": float, "dense_loss": float}, "`columns` has no `run` of"),
        ("needs", {"nodes": "node"}, "`needs` does not map tables to tuples of their columns"),
        ("needs", {"runs": ("node",)}, "`needs` names runs; the tables are nodes, metrics"),
        ("points", lambda tables: {}, "`points` does not take the 2 arguments that it is called with"),
        ("points", None, "`points` is not a function"),
        ("report", lambda: {}, "`report` does not take the 2 arguments"),
        ("form", replace(p2.FORM, predict=lambda points: points), "`predict` does not take the 2 arguments"),
        ("form", replace(p2.FORM, reduce=lambda: ({}, [])), "`reduce` does not take the 1 argument that"),
        ("points_are", None, "`points_are` is not a text"),
        ("options", dict, "`options` is not a subclass of LawOptions"),
        ("axis", ("bits", "bits"), "the column of `axis`, 'bits', is not a number among `columns`"),
        ("base", "model", "`base`, 'model', is not a number among `columns`"),
        ("form", None, "it must have either a `form` or a `report`"),
        ("form", p2.predict, "`form` is not a Form"),
        ("form", replace(p2.FORM, target="score"), "the form's target, 'score', is not a number among `columns`"),
        ("rivals", {"other": p2.predict}, "`rivals` does not map names to Forms"),
        ("held_out", {"later": None}, "`held_out` does not map names to functions"),
        ("report", "no", "`report` is not a function"),
        ("recommend", None, "`recommend` is not a function"),
    ],
)
def test_every_field_of_a_law_is_checked(field: str, value: Any, problem: str) -> None:
    (found,) = find_problems(replace(p2.LAW, **{field: value}))
    assert found.startswith(problem)


def test_what_is_not_a_law_is_refused() -> None:
    assert list(find_problems({"axis": 1})) == ["`LAW` is dict, not a Law of coppice.laws.contracts"]


@pytest.mark.parametrize("name", registry.names())
def test_the_laws_of_the_package_are_valid(name: str) -> None:
    law = registry.load(name)
    assert list(find_problems(law)) == []
    assert law.points_are.endswith(".")


def test_a_law_rests_on_its_own_file_the_engine_and_the_laws_that_it_imports() -> None:
    names = {file.as_posix().partition("coppice/laws/")[2] for file in registry.source_files("compression")}
    assert {"compression.py", "p2.py", "stage.py", "engine/search.py", "points/recoveries.py"} <= names
    assert not {"chinchilla.py", "precision.py", "density/__init__.py"} & names
    assert "learning_curve/trends.py" in {
        file.as_posix().partition("coppice/laws/")[2] for file in registry.source_files("learning-curve")
    }
