"""All methods on a tiny model of every architecture: a whole node that others can read, or a sentence that says why
not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import gather, make, save_root, save_windows
from rows import ROWS
from tiny import ARCHITECTURES, NORMS_AFTER, logits, tiny_tokens
from transformers import AutoModelForCausalLM

from coppice.errors import UserError
from coppice.files import read_json
from coppice.methods.registry import method
from coppice.models.checkpoint import load_model, read_manifest
from coppice.models.contracts import FROM_WINDOWS
from coppice.models.densify import export_dense
from coppice.recovery.stage import Recovery, recover

TOKENS = tiny_tokens()
REFUSALS = {
    ("rotate", architecture): "cannot be rotated: the weights of post_attention_layernorm"
    for architecture in NORMS_AFTER
}


class Roots:
    """A root of each architecture with its windows and statistics, each made once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cache  # noqa: B019
    def root(self, architecture: str) -> Path:
        return save_root(self.directory / architecture / "root", architecture=architecture, num_hidden_layers=2)

    @cache  # noqa: B019
    def windows(self, architecture: str, role: str = "calibration") -> Path:
        return save_windows(self.directory / architecture / role, self.root(architecture), role, documents=20)

    @cache  # noqa: B019
    def statistics(self, architecture: str, kind: str) -> Path:
        return gather(self.root(architecture), self.windows(architecture), kind, self.directory / architecture / kind)

    def inputs(self, architecture: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """What a method reads besides its parent."""
        used = method(name)
        needs = used.needs(used.validate_options(options))
        inputs: dict[str, Any] = {
            "statistics": [self.statistics(architecture, kind) for kind in sorted(needs - FROM_WINDOWS)]
        }
        return inputs | ({"tokens": self.windows(architecture)} if needs & FROM_WINDOWS else {})


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Roots:
    return Roots(tmp_path_factory.mktemp("roots"))


@pytest.mark.parametrize("name", [name for name in ROWS if method(name).family != "compensate"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_method_makes_a_node_or_is_refused(roots: Roots, architecture: str, name: str, tmp_path: Path) -> None:
    root, options = roots.root(architecture), ROWS[name][0]
    inputs = roots.inputs(architecture, name, options)
    if (name, architecture) in REFUSALS:
        with pytest.raises(UserError, match=REFUSALS[name, architecture]):
            make(tmp_path / "node", root, name, **inputs, **options)
        assert not (tmp_path / "node").exists()
        return
    node = make(tmp_path / "node", root, name, **inputs, **options)
    check(node, root, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_compensation_makes_a_node(roots: Roots, architecture: str, tmp_path: Path) -> None:
    root = roots.root(architecture)
    quantized = make(tmp_path / "quantized", root, "rtn", **ROWS["rtn"][0])
    moments = gather(quantized, roots.windows(architecture), "moments", tmp_path / "moments")
    node = make(tmp_path / "node", quantized, "eora", [moments], reference=root, **ROWS["eora"][0])
    check(node, root, tmp_path)


def check(node: Path, root: Path, scratch: Path) -> None:
    """The node computes the same whoever reads it, and differs from its root."""
    expected, config = logits(load_model(node), TOKENS), read_json(node / "config.json")
    assert torch.isfinite(expected).all()
    assert read_manifest(node).fingerprint != read_manifest(root).fingerprint
    if "compression" not in config:
        stock, report = AutoModelForCausalLM.from_pretrained(node, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        torch.testing.assert_close(logits(stock, TOKENS), expected, rtol=0, atol=1e-5)
    if {"quantized-activations", "quantized-cache"} & set(read_manifest(node).traits):
        return
    export_dense(node, scratch / "dense")
    dense = AutoModelForCausalLM.from_pretrained(scratch / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dense, TOKENS), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pruned_node_recovers(roots: Roots, architecture: str, name: str, tmp_path: Path) -> None:
    root = roots.root(architecture)
    pruned = make(tmp_path / "pruned", root, "magnitude", sparsity=0.5)
    texts = {"text": "a", "validation": "b"}
    options = {**texts, "length": 16, "tokens": 320, "batch_size": 4, "learning_rate": 1e-2}
    step = {"name": "grow", "method": name, "options": options}
    recovery, evaluation = roots.windows(architecture, "recovery"), roots.windows(architecture, "evaluation")
    node = tmp_path / "node"
    recover(
        Recovery(
            node="tiny/pruned/grow",
            parent=pruned,
            dense=root,
            tokens=recovery,
            validation=evaluation,
            step=step,
            state=tmp_path / "state",
            state_every=1e9,
            output=node,
        )
    )
    before, after = logits(load_model(pruned), TOKENS), logits(load_model(node), TOKENS)
    assert torch.isfinite(after).all() and not torch.allclose(after, before, atol=1e-3)
