"""Blocks of different widths: removed, stored, read, measured, and worked on by later steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import gather, make, save_root, save_windows
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, logits, tiny_model, tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM, MistralForCausalLM

from coppice.calibration.gradients import unit_scores
from coppice.errors import UserError
from coppice.evaluation import roofline
from coppice.export.stage import FORMATS, export
from coppice.files import read_json
from coppice.methods.recover import scratch
from coppice.models import modules
from coppice.models.checkpoint import load_model, read_manifest
from coppice.models.contracts import Removal
from coppice.models.densify import export_dense
from coppice.models.surgery import Widths, block_widths, describe_removal, remove
from coppice.records.compression import read_compression
from coppice.report.layer_records import _blocks
from coppice.report.show import achieved_lines

TOKENS = tiny_tokens()
# One group and five neurons from block 0, nothing from block 1, two neurons from block 2.
UNEQUAL = Removal(kv_groups=((1,), (), ()), neurons=((0, 5, 6, 46, 47), (), (3, 4)))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_config_states_the_largest_widths(architecture: str) -> None:
    model = tiny_model(architecture)
    record, before, config = describe_removal(model, UNEQUAL), parameters(model), model.config.to_dict()
    # One block keeps all of its units.
    assert remove(model, UNEQUAL).config.to_dict() == config
    assert record["parameters"]["removed"] == before - parameters(model)
    assert record["units"]["neurons"] == {"removed": [5, 0, 2], "of": [48, 48, 48], "share": 7 / 144}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_with_a_cache_is_generation_without(architecture: str) -> None:
    model = remove(tiny_model(architecture, dtype=torch.float64), UNEQUAL)
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached, uncached = (
        model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=use_cache, **arguments)
        for use_cache in (True, False)
    )
    assert cached.shape == (4, 18) and torch.equal(cached, uncached)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_comes_back_and_stock_classes_refuse_it(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = remove(tiny_model(architecture, tie_word_embeddings=tied), UNEQUAL)
    folder = save_root(tmp_path / "node", model)
    assert torch.equal(logits(load_model(folder), TOKENS), logits(model, TOKENS))
    assert read_manifest(folder).parameters.total == parameters(model)
    assert read_json(folder / "config.json")["auto_map"]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_removal_that_leaves_equal_blocks_leaves_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = remove(tiny_model(), UNEQUAL)
    assert block_widths(model) == [Widths(3, 43), Widths(4, 48), Widths(4, 46)]
    # Blocks 0 and 2 become alike, and the widest one goes: 6 heads do not divide 32 channels.
    again = remove(model, Removal(blocks=(1,), kv_groups=((), (), (0,)), neurons=((), (), (0, 1, 2))))
    assert isinstance(again, MistralForCausalLM)
    assert (again.config.num_key_value_heads, again.config.num_attention_heads) == (3, 6)
    assert (again.config.intermediate_size, again.config.head_dim) == (43, 4)
    folder = save_root(tmp_path / "node", again)
    assert read_json(folder / "compression.json") == {}
    assert not {"auto_map", "compression"} & read_json(folder / "config.json").keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder), TOKENS), logits(again, TOKENS))


def test_the_units_of_a_removed_block_do_not_count() -> None:
    removal = Removal(blocks=(1,), neurons=((0, 1), (), (4, 5)))
    model = tiny_model()
    expected = logits(remove(tiny_model(), Removal(blocks=(1,), neurons=((0, 1), (7, 8), (4, 5)))), TOKENS)
    assert describe_removal(model, removal)["units"]["neurons"] == {"removed": 2, "of": 48, "share": 2 / 48}
    narrower = remove(model, removal)
    assert narrower.config.intermediate_size == 46
    assert torch.equal(logits(narrower, TOKENS), expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A node whose blocks differ, its windows and moments, and what later steps make of it."""
    base = tmp_path_factory.mktemp("unequal")
    # Neurons that groups of 4 divide, in every block.
    removal = Removal(kv_groups=UNEQUAL.kv_groups, neurons=((0, 5, 46, 47), (), ()))
    node = save_root(base / "node", remove(tiny_model("olmo2"), removal))
    windows = save_windows(base / "windows", node)
    moments = gather(node, windows, "moments", base / "moments")
    nodes = {
        "node": node,
        "masked": make(base / "masked", node, "sparsegpt", [moments], sparsity=0.5),
        "quantized": make(base / "quantized", node, "gptq", [moments], bits=4, group_size=4),
        "factorized": make(base / "factorized", node, "svd-llm", [moments], keep=0.6),
        "sites": make(base / "sites", node, "compactifai", keep=0.5, sites=2),
        "codebook": make(base / "codebook", node, "k-bit", bits=4, outliers=0.1),
        "flattened": make(base / "flattened", node, "flattenquant", [moments], bits=8),
    }
    quantized_moments = gather(nodes["quantized"], windows, "moments", base / "quantized-moments")
    nodes["corrected"] = make(
        base / "corrected", nodes["quantized"], "eora", [quantized_moments], rank=2, reference=node
    )
    nodes["inputs"] = make(base / "inputs", nodes["masked"], "activation-quant", bits=8)
    nodes["cache"] = make(base / "cache", node, "gear", bits=4, group_size=4, buffer=4)
    return nodes


def test_later_steps_keep_the_shapes(folders: dict[str, Path]) -> None:
    q, norm = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_norm"
    shape = {"in_features": 32, "out_features": 24}
    assert read_compression(folders["node"])[q] == {"type": "Linear", **shape}
    assert read_compression(folders["masked"])[q] == {"type": "Masked", **shape}
    assert read_compression(folders["corrected"])[q] == {"type": "LowRankCorrection", **shape, "rank": 2}
    assert read_compression(folders["corrected"])[f"{q}.base"].keys() == {"type", "bits", "group_size", "symmetric"}
    for folder in folders.values():
        entries = read_compression(folder)
        assert entries[norm] == {"type": "Norm", "features": 24}
        assert shape.items() <= entries[q].items()
        assert not any("in_features" in entry for name, entry in entries.items() if "layers.1." in name)
    dense = logits(load_model(folders["node"]), TOKENS)
    errors = {name: (logits(load_model(folder), TOKENS) - dense).abs().mean() for name, folder in folders.items()}
    assert errors["node"] == 0 < errors["flattened"] < errors["quantized"] < errors["factorized"]
    assert errors["corrected"] < errors["quantized"]


def test_a_process_without_coppice_reads_nodes_by_the_code_they_carry(folders: dict[str, Path], tmp_path: Path) -> None:
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    script = f"""
import sys; sys.modules["coppice"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens = load_file("tokens.safetensors")["tokens"]
logits = {{}}
for node, folder in { ({node: str(folder) for node, folder in folders.items()})!r}.items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        logits[node] = model(tokens).logits
save_file(logits, "logits.safetensors")
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)
    theirs = load_file(tmp_path / "logits.safetensors")
    for node, folder in folders.items():
        assert torch.allclose(theirs[node], logits(load_model(folder), TOKENS), atol=1e-5), node


@pytest.mark.parametrize("node", ["node", "masked", "quantized", "factorized", "corrected"])
def test_the_roofline_counts_the_bytes_that_are_stored(folders: dict[str, Path], node: str) -> None:
    folder = folders[node]
    model = roofline.model_of_node(read_json(folder / "config.json"), read_compression(folder))
    stored = sum(
        tensor.nbytes
        for name, tensor in load_file(folder / "model.safetensors").items()
        if "norm" not in name and "embed" not in name and not name.endswith("weight_shape")
    )
    assert roofline.weight_bytes(model) == stored
    assert [(shape.heads, shape.kv_heads, shape.intermediate) for shape in model.shapes] == [
        (6, 3, 44),
        (8, 4, 48),
        (8, 4, 48),
    ]
    # Two sequences of ten tokens: keys and values of 3 + 4 + 4 heads of 4 channels in float32.
    assert roofline.kv_cache_bytes(model, 2, 10) == 2 * 2 * 10 * 11 * 4 * 4


def test_the_roofline_adds_up_blocks(folders: dict[str, Path]) -> None:
    folder = folders["node"]
    model = roofline.model_of_node(read_json(folder / "config.json"), read_compression(folder))

    def operations(passes: Any) -> float:
        return sum(one.operations * one.count for one in passes)

    def of_blocks(shape: roofline.Shape) -> float:
        uniform = roofline.uniform(shape._replace(layers=1), 32, 32, 32)
        return operations(roofline.prefill(uniform._replace(head=()), 2, 10)) - final_norm

    final_norm = 7 * 2 * 10 * 32
    expected = sum(of_blocks(shape) for shape in model.shapes) + final_norm
    assert operations(roofline.prefill(model._replace(head=()), 2, 10)) == expected


@pytest.mark.parametrize("to", FORMATS)
def test_exports_are_refused_with_the_blocks(folders: dict[str, Path], to: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"block 0 is narrower .* holds blocks of one width only"):
        export(folders["corrected" if to == "peft" else "quantized"], to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_export_is_refused_by_itself_too(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="block 0 is narrower"):
        export_dense(folders["factorized"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_taylor_importances_are_refused() -> None:
    model = remove(tiny_model(), UNEQUAL)
    with pytest.raises(UserError, match="blocks of this model are of different widths"):
        unit_scores(model, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), 4)


def test_training_from_scratch_draws_weights_of_every_width() -> None:
    model = remove(tiny_model(), UNEQUAL)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    drawn = scratch.prepare(model, scratch.Options.model_construct())
    assert {name: parameter.shape for name, parameter in drawn.named_parameters()} == shapes
    scale = model.config.initializer_range
    for name, linear in modules.weight_matrices(model).items():
        assert 0.8 * scale < linear.weight.std() < 1.2 * scale, name


def test_the_report_says_what_each_block_keeps(folders: dict[str, Path]) -> None:
    record = describe_removal(tiny_model(), Removal(blocks=(2,), kv_groups=((1,), (), ()), neurons=UNEQUAL.neurons))
    kept = _blocks(record)
    assert [row["neurons kept"] for row in kept.values()] == [43, 48, 0]
    assert [row["key/value groups kept"] for row in kept.values()] == [3, 4, 0]
    manifest = read_manifest(folders["node"]).model_copy(update={"achieved": record})
    lines = ["Removed: 1 of 3 blocks, 5 of all 12 kv groups and 53 of all 144 neurons."]
    assert achieved_lines(manifest) == lines
