"""Every replacement has a form of its name, every form a replacement; names of older checkpoints are read."""

from __future__ import annotations

import ast
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import make, save_root
from tiny import logits, tiny_model, tiny_tokens

from coppice.errors import UserError
from coppice.evaluation import roofline
from coppice.files import describe_files, read_json, write_json
from coppice.models import modules, replacements
from coppice.models.checkpoint import load_model
from coppice.records.compression import read_compression

UP = "model.layers.0.mlp.up_proj"


def subclasses(base: type) -> set[type]:
    """Those that the package defines."""
    return {each for each in base.__subclasses__() if each.__module__.startswith("coppice.")}


def test_replacements_and_forms_are_pairs() -> None:
    """A stored form takes two places: its dataclass and its module."""
    stored = {each.__name__ for each in subclasses(replacements.Replacement) if not each.keeps_linear}
    assert {each.__name__ for each in subclasses(replacements.Replacement)} - stored == {
        "Unchanged",
        "Masked",
        "QuantizedActivations",
    }
    defined = subclasses(modules.StoredForm) - {modules.PackedForm} | subclasses(modules.PackedForm)
    assert {each.__name__ for each in defined} == {f"{name}Linear" for name in stored}
    assert {modules.FORMS[name].__name__ for name in stored} == {f"{name}Linear" for name in stored}


def test_files_that_checkpoints_carry_import_nothing_that_a_loader_lacks() -> None:
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for file in Path(modules.__file__).parent.glob("*.py"):
        if file.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert {name.partition(".")[0] for name in names} <= allowed, file


def test_a_form_that_is_not_known_is_one_sentence() -> None:
    with pytest.raises(UserError, match="names the type 'Wavelet', which this version of Coppice does not know"):
        replacements.form_of({"type": "Wavelet"})


# What compression.json said of a linear [48, 32] before the names changed, and what it is now.
OLD_ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "Coded": (
        {UP: {"type": "Coded", "bits": 4, "block": 16, "outliers": 2, "transposed": False}},
        "Codebook",
    ),
    "Flattened": ({UP: {"type": "Flattened", "bits": 8, "expanded": 35}}, "FlattenQuant"),
    "Skeleton": ({UP: {"type": "Skeleton", "rank": 5}}, "CUR"),
    "Compensated": (
        {UP: {"type": "Compensated", "rank": 3}, f"{UP}.compensation": {"type": "LowRank", "rank": 3}},
        "LowRankCorrection",
    ),
    "rounded_inputs": (
        {UP: {"type": "Linear", "rounded_inputs": {"bits": 8, "symmetric": True, "clip": 1.0}}},
        "Linear",
    ),
}


@pytest.mark.parametrize("name", OLD_ENTRIES)
def test_names_of_older_checkpoints_are_read(tmp_path: Path, name: str) -> None:
    old, kind = OLD_ENTRIES[name]
    write_json(tmp_path / "compression.json", old)
    entries = read_compression(tmp_path)
    assert entries[UP]["type"] == kind
    model = tiny_model()
    modules.install(model, entries)
    assert modules.describe_replacements(model) == entries
    assert name not in str(entries)
    assert roofline.products(entries, UP, 32, 48, 32)


def test_an_older_checkpoint_loads_with_its_values(tmp_path: Path) -> None:
    node = make(tmp_path / "node", save_root(tmp_path / "root"), "k-bit", bits=4, outliers=0.1)
    expected = logits(load_model(node), tiny_tokens())
    text = (node / "compression.json").read_text()
    assert '"Codebook"' in text
    (node / "compression.json").write_text(text.replace('"Codebook"', '"Coded"'))
    manifest = read_json(node / "manifest.json")
    manifest["files"]["compression.json"] = asdict(describe_files(node)["compression.json"])
    write_json(node / "manifest.json", manifest)
    assert torch.equal(logits(load_model(node), tiny_tokens()), expected)
