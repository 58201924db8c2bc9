"""Statistics are those of the model's own forward, whatever the batches, the padding and the modules in place."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import WORDS, gather, make, save_root, save_windows
from tiny import ARCHITECTURES, exact_norms, tiny_model
from torch import Tensor, nn

from coppice.calibration import moments as moments_module
from coppice.calibration import walk
from coppice.calibration.reading import MOMENT_FIELDS, block_statistics, read_statistics, read_statistics_file
from coppice.data.windows import load_windows, tokenize
from coppice.data.windows import save_windows as write_windows
from coppice.errors import UserError
from coppice.models import modules
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import load_model, read_manifest
from coppice.models.contracts import LinearStatistics
from coppice.records.statistics import Statistics

DISTINCT = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_root(tmp_path_factory.mktemp("calibrate") / "root", num_hidden_layers=2)


@pytest.fixture(scope="module")
def windows(root: Path) -> Path:
    return save_windows(root.with_name("windows"), root)


def short_window(architecture: str) -> dict[str, Any]:
    """A sliding window shorter than the windows of tokens, for the architecture that slides."""
    return {"sliding_window": 6} if architecture == "mistral" else {}


def direct_inputs(root: Path, sequences: list[Tensor]) -> dict[str, Tensor]:
    """[tokens, n] float64 inputs of every linear in the blocks, from whole forwards on sequences without padding."""
    model = exact_norms(load_model(root).double())
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in blocks(model).named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for tokens in sequences:
            model(input_ids=tokens, use_cache=False)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def assert_moments(folder: Path, root: Path, inputs: dict[str, Tensor]) -> None:
    manifest = read_statistics(folder, read_manifest(root).fingerprint)
    for index in range(manifest.blocks):
        assert manifest.aliases[str(index)] == DISTINCT
        found = block_statistics(folder, index, manifest, "cpu")
        for name in DISTINCT:
            x, entry = inputs[f"{index}.{name}"], found[name]
            expected = (x.T @ x / len(x), x.mean(0), x.abs().mean(0), x.abs().amax(0))
            for field, value in zip(MOMENT_FIELDS, expected, strict=True):
                torch.testing.assert_close(
                    getattr(entry, field).double(), value, rtol=1e-4, atol=1e-5 * float(value.abs().max())
                )
            assert entry.tokens == len(x)
        assert found["self_attn.v_proj"].second_moment is found["self_attn.q_proj"].second_moment


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moments_are_those_of_a_whole_forward(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "TOKENS_IN_A_BATCH", 160)
    root = save_root(tmp_path / "root", architecture=architecture, num_hidden_layers=2, **short_window(architecture))
    windows = save_windows(tmp_path / "windows", root)
    moments = gather(root, windows, "moments", tmp_path / "moments")
    tokens = torch.as_tensor(load_windows(windows).tokens).long()
    assert_moments(moments, root, direct_inputs(root, [tokens]))


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_padding_leaves_no_trace(tmp_path: Path, architecture: str) -> None:
    root = save_root(tmp_path / "root", architecture=architecture, num_hidden_layers=2, **short_window(architecture))
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(WORDS[start : start + 2 * start + 1]) for start in range(1, 12)))
    text = {"path": str(path), "splits": {"calibration": 1}}
    windows = tokenize(root, text, "calibration", 0, 24, pack=False)
    write_windows(windows, tmp_path / "windows")
    kept = windows.documents >= 0
    assert 0 < kept.sum() < kept.size
    moments = gather(root, tmp_path / "windows", "moments", tmp_path / "moments")
    alone = [torch.as_tensor(row[mask])[None].long() for row, mask in zip(windows.tokens, kept, strict=True)]
    assert_moments(moments, root, direct_inputs(root, alone))
    blocks = gather(root, tmp_path / "windows", "blocks", tmp_path / "blocks")
    assert similarities(blocks) == pytest.approx(direct_similarities(root, alone), abs=1e-6)


def similarities(folder: Path) -> list[float]:
    manifest = Statistics.read(folder / "manifest.json")
    return read_statistics_file(folder, "blocks.safetensors", manifest)["similarity"].tolist()


def direct_similarities(root: Path, sequences: list[Tensor]) -> list[float]:
    """Mean cosine between what enters and what leaves each block."""
    model = exact_norms(load_model(root).double())
    found: dict[int, list[Tensor]] = defaultdict(list)

    def note(index: int, before: Tensor, after: Tensor) -> None:
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        found[index].append(cosine.flatten())

    for index, block in enumerate(blocks(model)):
        block.register_forward_hook(lambda _, inputs, output, index=index: note(index, inputs[0], output))
    with torch.no_grad():
        for tokens in sequences:
            model(input_ids=tokens, use_cache=False)
    return [torch.cat(parts).mean().item() for parts in found.values()]


def test_a_block_that_adds_nothing_is_wholly_similar(tmp_path: Path, windows: Path) -> None:
    model = tiny_model(num_hidden_layers=2)
    block = blocks(model)[1]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    root = save_root(tmp_path / "root", model)
    tokens = torch.as_tensor(load_windows(windows).tokens).long()
    found = similarities(gather(root, windows, "blocks", tmp_path / "blocks"))
    assert found == pytest.approx(direct_similarities(root, [tokens]), abs=1e-6)
    assert found[0] < 0.999
    assert found[1] == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("tokens_in_a_batch", [1, 100, 8192])
def test_the_walk_gives_the_hidden_states_of_a_whole_forward(
    root: Path, windows: Path, tokens_in_a_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "TOKENS_IN_A_BATCH", tokens_in_a_batch)
    model = load_model(root)
    tokens, kept = walk.as_tensors(load_windows(windows))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    batches = walk.embed(model, tokens, kept)
    assert max(len(batch.hidden) for batch in batches) == min(len(tokens), max(1, tokens_in_a_batch // 16))
    for index in range(len(blocks(model))):
        assert torch.allclose(torch.cat([batch.hidden for batch in batches]), expected[index], atol=1e-5)
        for batch in batches:
            batch.hidden = walk.run_block(model, index, batch, "cpu")
    last = model.model.norm(torch.cat([batch.hidden for batch in batches]))
    assert torch.allclose(last, expected[-1], atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("self_attn.o_proj", r"The input of model\.layers\.1\.mlp\.gate_proj"),
        ("mlp.down_proj", r"The output of model\.layers\.1 "),
    ],
)
def test_a_weight_that_is_not_a_number_is_found(tmp_path: Path, windows: Path, weight: str, place: str) -> None:
    model = tiny_model(num_hidden_layers=2)
    blocks(model)[1].get_submodule(weight).weight.data[0, 0] = torch.nan
    root = save_root(tmp_path / "root", model)
    with pytest.raises(UserError, match=place):
        gather(root, windows, "moments", tmp_path / "moments")
    assert not (tmp_path / "moments" / "manifest.json").exists()


@pytest.mark.parametrize("stage", ["calibrate", "compress"])
def test_the_moments_of_one_block_are_held_at_a_time(
    root: Path, windows: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref] = []
    begun = []
    gather_block, initialize = moments_module.gather_block, LinearStatistics.__init__

    def noted(entry: LinearStatistics, **fields: Any) -> None:
        initialize(entry, **fields)
        made.append(weakref.ref(entry.second_moment))

    def watched(*arguments: Any) -> Any:
        gc.collect()
        begun.append([reference() for reference in made if reference() is not None])
        return gather_block(*arguments)

    monkeypatch.setattr(LinearStatistics, "__init__", noted)
    monkeypatch.setattr(moments_module, "gather_block", watched)
    if stage == "calibrate":
        gather(root, windows, "moments", tmp_path / "moments")
    else:
        make(tmp_path / "node", root, "gptq", bits=4, group_size=16, sequential=True, tokens=windows)
    assert begun == [[], []]
    assert len(made) == 2 * len(set(DISTINCT.values()))


def test_statistics_of_another_model_are_refused(root: Path, windows: Path, tmp_path: Path) -> None:
    moments = gather(root, windows, "moments", tmp_path / "moments")
    other = save_root(tmp_path / "other", num_hidden_layers=2, seed=1)
    with pytest.raises(UserError, match="were gathered on another model"):
        make(tmp_path / "node", other, "wanda", [moments], sparsity=0.5)
    assert not (tmp_path / "node").exists()


def test_damaged_statistics_are_refused(root: Path, windows: Path, tmp_path: Path) -> None:
    moments = gather(root, windows, "moments", tmp_path / "moments")
    path = moments / "block-001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"block-001\.safetensors is not the file that its manifest describes"):
        make(tmp_path / "node", root, "wanda", [moments], sparsity=0.5)


def test_windows_of_another_tokenizer_are_refused(root: Path, windows: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(root, other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"w60"', '"other"'))
    with pytest.raises(UserError, match="another tokenizer"):
        gather(other, windows, "moments", tmp_path / "moments")


def test_composites_are_calibrated_as_wholes_and_in_their_parts(root: Path, windows: Path, tmp_path: Path) -> None:
    factorized = make(tmp_path / "factorized", root, "svd", keep=0.5)
    quantized = make(tmp_path / "quantized", factorized, "rtn", bits=8, group_size=-1)
    moments = gather(quantized, windows, "moments", tmp_path / "moments")
    options = {"rank": 2, "reference": factorized}
    compensated = make(tmp_path / "compensated", quantized, "eora", [moments], **options)
    for node, prefix in ((quantized, ""), (compensated, ".base")):
        folder = gather(node, windows, "moments", tmp_path / f"moments-of-{node.name}")
        manifest = Statistics.read(folder / "manifest.json")
        found = block_statistics(folder, 1, manifest, "cpu")
        block = blocks(load_model(node))[1]
        assert found.keys() == modules.replaceable_modules(block).keys() | modules.weight_matrices(block).keys()
        for name in DISTINCT:
            factors = block.get_submodule(name + prefix)
            assert isinstance(factors.first, modules.QuantizedLinear)
            whole, first, second = (found[name + part] for part in ("", f"{prefix}.first", f"{prefix}.second"))
            assert first.second_moment is whole.second_moment is found[DISTINCT[name]].second_moment
            expected = factors.first.weight @ whole.second_moment @ factors.first.weight.T
            torch.testing.assert_close(second.second_moment, expected, rtol=1e-3, atol=1e-4)
