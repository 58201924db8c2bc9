"""A structure method sees the whole decoder, and may return new weights for what stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import make, save_root, save_windows
from tiny import logits, tiny_model, tiny_tokens
from torch import Tensor

from coppice.errors import UserError
from coppice.methods import registry
from coppice.methods.declaration import Resources, Source, StructureMethod
from coppice.methods.options import MethodOptions
from coppice.models import surgery
from coppice.models.checkpoint import load_model, read_manifest
from coppice.models.contracts import Decoder, Removal

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
Choose = Callable[[Decoder, Mapping[str, Tensor], MethodOptions], Removal]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers a structure method named `toy` for one test."""

    def as_toy(choose: Choose, **fields: Any) -> None:
        declaration = StructureMethod(
            source=Source("Toy", "none", "none"),
            options=MethodOptions,
            adds_traits=frozenset({"smaller"}),
            choose=choose,
            **fields,
        )
        toy = registry.Method("toy", "prune", declaration, Path(__file__))
        methods = {**registry.methods(), "toy": toy}
        monkeypatch.setattr(registry, "methods", lambda: methods)

    return as_toy


def merge(decoder: Decoder, statistics: Mapping[str, Tensor], options: MethodOptions) -> Removal:
    """Removes the last block and half of every block's neurons; what stays of block 0 takes the mean with block 1."""
    half = decoder.structure.neurons // 2
    up, down = (
        (decoder.linear(name).weight + decoder.linear(name.replace("layers.0", "layers.1")).weight) / 2
        for name in (UP, DOWN)
    )
    return Removal(
        blocks=(decoder.structure.blocks - 1,),
        neurons=(tuple(range(half)),) * decoder.structure.blocks,
        weights={UP: up[half:], DOWN: down[:, half:]},
    )


def test_new_weights_arrive_exactly(register: Callable[..., None], tmp_path: Path) -> None:
    root = save_root(tmp_path / "root")
    register(merge)
    node = make(tmp_path / "node", root, "toy")
    before, after = (dict(load_model(folder).named_parameters()) for folder in (root, node))
    names = [(name, name.replace("layers.0", "layers.1")) for name in (f"{UP}.weight", f"{DOWN}.weight")]
    up, down = ((before[first] + before[second]) / 2 for first, second in names)
    assert torch.equal(after[f"{UP}.weight"], up[24:])
    assert torch.equal(after[f"{DOWN}.weight"], down[:, 24:])
    # What got no new weight keeps what the removal leaves of its own.
    assert torch.equal(after["model.layers.0.mlp.gate_proj.weight"], before["model.layers.0.mlp.gate_proj.weight"][24:])
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"][24:])
    assert load_model(node).config.num_hidden_layers == 2
    assert read_manifest(node).achieved["units"]["neurons"]["removed"] == 24


def test_blocks_may_lose_different_numbers_of_units(register: Callable[..., None], tmp_path: Path) -> None:
    root = save_root(tmp_path / "root")
    neurons = (0, 5, 6, 20, 30)
    removal = Removal(kv_groups=((1,), (), ()), neurons=(neurons, (), ()))
    register(lambda decoder, statistics, options: removal)
    node = make(tmp_path / "node", root, "toy")
    expected, tokens = load_model(root), tiny_tokens()
    with torch.no_grad():
        # Two query heads of 4 channels read each key/value head.
        expected.model.layers[0].self_attn.o_proj.weight[:, 8:16] = 0
        expected.model.layers[0].mlp.down_proj.weight[:, neurons] = 0
    model = load_model(node)
    torch.testing.assert_close(logits(model, tokens), logits(expected, tokens), rtol=0, atol=1e-5)
    assert model.model.layers[0].mlp.up_proj.out_features == 43
    assert read_manifest(node).achieved["units"]["kv_groups"]["removed"] == [1, 0, 0]
    # What the next structure method removes is counted in the units that are left.
    assert load_model(make(tmp_path / "again", node, "toy")).model.layers[0].mlp.up_proj.out_features == 38


def test_names_count_the_blocks_before_the_removal() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    name = "model.layers.2.mlp.down_proj"
    weight = torch.full((32, 48), 0.5)
    expected = tiny_model()
    expected.get_submodule(name).weight.data.copy_(weight)
    removal = Removal(blocks=(0,), weights={name: weight})
    shorter, expected = surgery.remove(model, removal), surgery.remove(expected, Removal(blocks=(0,)))
    assert torch.equal(shorter.get_submodule("model.layers.1.mlp.down_proj").weight, weight)
    assert torch.equal(logits(shorter, tokens), logits(expected, tokens))


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        (DOWN, (32, 48), r"^model\.layers\.0\.mlp\.down_proj: .* shape \(32, 48\), and after .* has \(32, 24\)\.$"),
        ("model.layers.1.mlp.down_proj", (32, 24), r"^model\.layers\.1\.mlp\.down_proj: .* no linear of that name"),
        ("model.layers.0.mlp.down", (32, 24), r"^model\.layers\.0\.mlp\.down: .* no linear of that name"),
    ],
    ids=["shape", "removed", "unknown"],
)
def test_new_weights_that_fit_nothing_are_refused(name: str, shape: tuple[int, int], sentence: str) -> None:
    neurons = (tuple(range(24)),) * 3
    with pytest.raises(UserError, match=sentence):
        surgery.remove(tiny_model(), Removal(blocks=(1,), neurons=neurons, weights={name: torch.zeros(shape)}))


def test_the_least_missed_block_is_found_by_the_loss(register: Callable[..., None], tmp_path: Path) -> None:
    """A method that reads windows sees losses with blocks bypassed."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    root = save_root(tmp_path / "root", model)

    def choose(decoder: Decoder, statistics: Mapping[str, Tensor], options: MethodOptions) -> Removal:
        losses = [decoder.loss(bypass=[block]).item() for block in range(decoder.structure.blocks)]
        whole = decoder.loss().item()
        block = min(range(len(losses)), key=lambda block: abs(losses[block] - whole))
        return Removal(blocks=(block,), record={"block": block, "states": len(decoder.hidden_states(0))})

    register(choose, needs=frozenset({"windows"}), resources=Resources(reach="model"))
    windows = save_windows(tmp_path / "windows", root)
    achieved = read_manifest(make(tmp_path / "node", root, "toy", tokens=windows)).achieved
    assert (achieved["block"], achieved["states"]) == (1, 4)
    with pytest.raises(UserError, match="needs the calibration windows themselves"):
        make(tmp_path / "node", root, "toy")
