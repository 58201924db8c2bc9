"""What a method that draws takes its random numbers from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nodes import save_root

from coppice.compression.stage import compress
from coppice.methods import registry
from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.options import LayerOptions
from coppice.models.contracts import Linear, linear_seed
from coppice.models.replacements import Unchanged


def test_each_linear_has_a_seed_of_its_own_that_follows_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: dict[str, int] = {}

    def note(linear: Linear, statistics: Any, options: LayerOptions) -> Unchanged:
        seeds[linear.name] = linear.seed
        return Unchanged(record={"unchanged": "This is a test."})

    declaration = LayerMethod(source=Source("Toy", "none", "none"), options=LayerOptions, compress=note, draws=True)
    methods = {**registry.methods(), "toy": registry.Method("toy", "prune", declaration, Path(__file__))}
    monkeypatch.setattr(registry, "methods", lambda: methods)
    root = save_root(tmp_path / "root", num_hidden_layers=2)
    for seed in (0, 7):
        step = {"name": "toy", "method": "toy", "options": {}}
        compress("tiny/toy", root, step, tmp_path / str(seed), [], seed=seed)
        assert len(seeds) == len(set(seeds.values())) == 14
        assert seeds == {name: linear_seed(seed, name) for name in seeds}
        # Any one of them alone gets the same.
        first, alone = dict(seeds), {"target_modules": ["down_proj"]}
        seeds.clear()
        compress("tiny/toy", root, {**step, "options": alone}, tmp_path / f"{seed}-alone", [], seed=seed)
        assert len(seeds) == 2
        assert seeds.items() <= first.items()
        seeds.clear()
