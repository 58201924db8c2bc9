"""Every layer method on a checkpoint whose numbers are bfloat16, of an architecture with biases and tied embeddings."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import gather, make, save_root, save_windows
from rows import ROWS
from safetensors.torch import load_file
from tiny import logits, tiny_tokens
from torch import nn

from coppice.methods.registry import method
from coppice.methods.solvers.codebook import encode
from coppice.models import modules
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import load_model, read_manifest
from coppice.models.modules.codebook import TABLE_UNIT

ALL = {name: options[0] for name, options in ROWS.items()}
LAYER_METHODS = [name for name in ALL if method(name).contract == "layer"]
# A rounding to 8 bits of significance, of each factor of a product and of the product.
ROUNDING = 3 * 2.0**-8


class Workshop:
    """Nodes of one bfloat16 root, each made once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        changes = {"architecture": "qwen2", "num_hidden_layers": 1, "tie_word_embeddings": True}
        self.root = save_root(directory / "root", dtype=torch.bfloat16, **changes)
        self.windows = save_windows(directory / "windows", self.root)

    @cache  # noqa: B019
    def statistics(self, parent: Path, kind: str) -> Path:
        return gather(parent, self.windows, kind, self.directory / "statistics" / parent.name / kind)

    @cache  # noqa: B019
    def node(self, name: str) -> Path:
        used = method(name)
        needs = used.needs(used.validate_options(ALL[name]))
        parent, inputs = self.root, {}
        if used.family == "compensate":
            parent, inputs["reference"] = self.node("rtn"), self.root
        if needs & {"windows", "sequential_moments"}:
            inputs["tokens"] = self.windows
        kinds = sorted(needs & {"moments", "blocks", "gradients"})
        gathered = [self.statistics(parent, kind) for kind in kinds]
        return make(self.directory / name, parent, name, gathered, **inputs, **ALL[name])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("bfloat16"))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {f"model.layers.{name}": linear for name, linear in modules.replaceable_modules(blocks(model)).items()}


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_stored_weights_are_what_the_manifest_says(workshop: Workshop, name: str) -> None:
    folder = workshop.node(name)
    tensors, manifest = load_file(folder / "model.safetensors"), read_manifest(folder)
    assert {each.dtype for each in tensors.values() if each.is_floating_point()} == {torch.bfloat16}
    before, after = linears(load_model(workshop.root)), linears(load_model(folder))
    assert manifest.layers.keys() <= before.keys()
    for place, record in manifest.layers.items():
        # Where inputs are scaled, the error is that of the scaled weight.
        if "scale_ratio" not in record:
            dense, stored = before[place].weight, modules.effective_weight(after[place])
            error = ((stored - dense).square().sum() / dense.square().sum()).item()
            assert record["weight_error"] == pytest.approx(error, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_computes_the_same_in_bfloat16(workshop: Workshop, name: str) -> None:
    exact, narrow = (load_model(workshop.node(name), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.isfinite(logits(narrow, tiny_tokens())).all()
    for place, linear in linears(exact).items():
        weight, rounded = (modules.effective_weight(each).float() for each in (linear, linears(narrow)[place]))
        assert (rounded - weight).norm() <= ROUNDING * weight.norm()


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_biases_stay(workshop: Workshop, name: str) -> None:
    before, after = linears(load_model(workshop.root)), linears(load_model(workshop.node(name)))
    for place, linear in before.items():
        if linear.bias is None:
            assert after[place].bias is None
        # What makes an input that is scaled, as v does, is scaled with its bias.
        elif not (
            place.endswith("v_proj") and method(name).contract == "layer" and method(name).layer.scales is not None
        ):
            zero = torch.zeros(1, linear.in_features)
            torch.testing.assert_close(after[place](zero)[0], linear.bias, rtol=0, atol=0)


def test_codes_are_chosen_against_stored_scales(workshop: Workshop) -> None:
    before = linears(load_model(workshop.root))
    for place, linear in linears(load_model(workshop.node("rtn"))).items():
        scale = linear.weight_scale.repeat_interleave(linear.in_features // linear.weight_scale.shape[1], dim=1)
        assert ((linear.weight - before[place].weight).abs() <= scale * (0.5 + ROUNDING * 2**linear.bits)).all()


def test_tables_are_not_rounded(workshop: Workshop) -> None:
    for linear in linears(load_model(workshop.node("k-bit"))).values():
        table = linear.weight_table.double() * TABLE_UNIT
        assert table.bfloat16().double().ne(table).any()
        assert set((table[encode(table, table).long()] - table).tolist()) == {0.0}


@pytest.mark.parametrize("architecture", ["llama-gqa", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("name", "options"), [("awq", {"bits": 8, "group_size": 16, "indivisible": "row"}), ("flattenquant", {"bits": 8})]
)
def test_scaled_inputs_change_nothing(tmp_path: Path, architecture: str, name: str, options: dict[str, Any]) -> None:
    root = save_root(tmp_path / "root", architecture=architecture, num_hidden_layers=1)
    moments = gather(root, save_windows(tmp_path / "windows", root), "moments", tmp_path / "moments")
    node = make(tmp_path / "node", root, name, [moments], **options)
    records = read_manifest(node).layers.values()
    assert any(record.get("scale_ratio", 1) > 1.05 for record in records)
    dense, found = (logits(load_model(folder), tiny_tokens()) for folder in (root, node))
    assert (found - dense).norm() < 0.05 * dense.norm()
