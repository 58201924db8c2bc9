"""`compress` does to every linear what its method says, with the statistics it says, or changes nothing."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nodes import gather, make, save_root, save_windows
from safetensors import SafetensorError
from tiny import logits, tiny_model, tiny_tokens
from torch import Tensor, nn

from coppice.calibration.moments import Moments
from coppice.calibration.reading import block_statistics, read_statistics_file
from coppice.data.windows import load_windows
from coppice.errors import UserError
from coppice.methods.registry import method
from coppice.methods.solvers.grid import dequantize
from coppice.models import modules, surgery
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import load_model, read_manifest
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import LowRank, Masked, Quantized, Replacement
from coppice.records.statistics import Statistics

STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {"sparsity": 0.5}),
    "wanda": ("wanda", {"sparsity": 0.5}),
    "wanda-2:4": ("wanda", {"pattern": "2:4"}),
    "sparsegpt": ("sparsegpt", {"sparsity": 0.25}),
    "svd": ("svd", {"keep": 0.5}),
    "svd-llm": ("svd-llm", {"rank": 12}),
    "rtn": ("rtn", {"bits": 4, "group_size": 16}),
    "gptq": ("gptq", {"bits": 3, "group_size": -1, "symmetric": True, "act_order": True}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of an architecture with biases."""
    return save_root(tmp_path_factory.mktemp("compress") / "root", architecture="qwen2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def windows(root: Path) -> Path:
    return save_windows(root.with_name("windows"), root)


@pytest.fixture(scope="module")
def statistics(root: Path, windows: Path) -> dict[str, Path]:
    return {kind: gather(root, windows, kind, root.with_name(kind)) for kind in ("moments", "blocks", "gradients")}


def read_moments(folder: Path) -> dict[str, LinearStatistics]:
    manifest = Statistics.read(folder / "manifest.json")
    return {
        f"{index}.{name}": entry
        for index in range(manifest.blocks)
        for name, entry in block_statistics(folder, index, manifest, "cpu").items()
    }


def weight_of(replacement: Replacement, weight: Tensor) -> Tensor:
    """[m, n] what a replacement multiplies by."""
    if isinstance(replacement, Masked):
        return replacement.weight
    if isinstance(replacement, LowRank):
        return replacement.second @ replacement.first
    return dequantize(replacement) if isinstance(replacement, Quantized) else weight


def relative(difference: Tensor, wanted: Tensor, moment: Tensor | None = None) -> float:
    """tr(dW H dW^T) / tr(W H W^T)."""
    moment = torch.eye(wanted.shape[1]) if moment is None else moment
    power = [torch.trace(each.double() @ moment.double() @ each.double().T) for each in (difference, wanted)]
    return (power[0] / power[1]).item()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", STEPS)
def test_every_linear_is_what_the_method_makes_of_it(
    root: Path, statistics: dict[str, Path], step: str, tmp_path: Path
) -> None:
    name, values = STEPS[step]
    node = make(tmp_path / "node", root, name, [statistics["moments"]], **values)
    used, moments = method(name), read_moments(statistics["moments"])
    manifest, dense = read_manifest(node), modules.replaceable_modules(blocks(load_model(root)))
    stored = modules.replaceable_modules(blocks(load_model(node)))
    assert len(stored) == len(dense) == len(manifest.layers) == 14
    for place, linear in dense.items():
        weight, module, moment = linear.weight.detach(), stored[place], moments[place]
        pure = Linear(weight, storage=torch.float32)
        replacement = used.layer.compress(pure, moment, used.validate_options(values))
        new = modules.effective_weight(module).detach()
        torch.testing.assert_close(new, weight_of(replacement, weight), rtol=0, atol=1e-6)
        assert (module.bias is None) == (linear.bias is None)
        assert linear.bias is None or torch.equal(module.bias, linear.bias)
        record = manifest.layers[f"model.layers.{place}"]
        assert replacement.record.items() <= record.items()
        assert record["weight_error"] == pytest.approx(relative(new - weight, weight), rel=1e-3)
        assert record["error"] == pytest.approx(relative(new - weight, weight, moment.second_moment), rel=1e-3)
        assert_budget(module, values)
    errors = [record["error"] for record in manifest.layers.values()]
    assert manifest.achieved["error"] == pytest.approx(sum(errors) / len(errors))
    assert 0 < manifest.achieved["error"] < 1


def assert_budget(module: nn.Module, asked: dict[str, Any]) -> None:
    """The stored module takes what was asked, to the weight."""
    if "sparsity" in asked:
        assert int((module.weight == 0).sum()) == asked["sparsity"] * module.weight.numel()
    elif "pattern" in asked:
        assert ((module.weight != 0).view(-1, 4).sum(1) == 2).all()
    elif "bits" in asked:
        width = module.in_features if asked["group_size"] == -1 else asked["group_size"]
        groups = module.weight.view(-1, width)
        assert max(len(group.unique()) for group in groups) <= 2 ** asked["bits"]
        assert module.weight_packed.shape[1] == modules.packed_words(module.in_features, asked["bits"])
    else:
        m, n = module.out_features, module.in_features
        rank = asked.get("rank") or int(asked["keep"] * m * n / (m + n))
        assert isinstance(module, nn.Linear) if rank >= m * n // (m + n) else module.first.out_features == rank


def test_a_correction_is_fitted_to_the_reference(
    root: Path, windows: Path, statistics: dict[str, Path], tmp_path: Path
) -> None:
    parent = make(tmp_path / "parent", root, "rtn", bits=2, group_size=16)
    folder = gather(parent, windows, "moments", tmp_path / "moments")
    node = make(tmp_path / "node", parent, "eora", [folder], rank=3, reference=root)
    used, moments, manifest = method("eora"), read_moments(folder), read_manifest(node)
    before, compressed, stored = (
        modules.replaceable_modules(blocks(load_model(path))) for path in (root, parent, node)
    )
    with torch.no_grad():
        for place, module in stored.items():
            linear = Linear(compressed[place].weight, reference=before[place].weight)
            expected = used.layer.compress(linear, moments[place], used.validate_options({"rank": 3}))
            added = modules.effective_weight(module.compensation)
            torch.testing.assert_close(added, expected.second @ expected.first, rtol=0, atol=1e-6)
            difference = linear.weight + added - linear.reference
            record = manifest.layers[f"model.layers.{place}"]
            moment = moments[place].second_moment
            assert record["error"] == pytest.approx(relative(difference, linear.reference, moment), rel=1e-3)
            assert record["error"] < relative(linear.weight - linear.reference, linear.reference, moment)


@pytest.mark.parametrize(
    ("name", "values"), [("svd-llm", {"keep": 0.5}), ("gptq", {"bits": 3, "group_size": 16})], ids=["svd-llm", "gptq"]
)
def test_sequential_statistics_are_gathered_after_the_compressed_blocks(
    root: Path, windows: Path, statistics: dict[str, Path], tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    static = make(tmp_path / "static", root, name, [statistics["moments"]], **values)
    node = make(tmp_path / "node", root, name, sequential=True, tokens=windows, **values)
    first, second = (
        [modules.replaceable_modules(blocks(load_model(path))[index]) for path in (static, node)] for index in (0, 1)
    )
    for linear, twin in zip(*(each.values() for each in first), strict=True):
        assert torch.equal(modules.effective_weight(linear), modules.effective_weight(twin))
    assert not torch.equal(*(modules.effective_weight(each["mlp.down_proj"]) for each in second))
    expected = by_hand(load_model(root), windows, name, values)
    found = modules.replaceable_modules(blocks(load_model(node)))
    for place, weight in expected.items():
        torch.testing.assert_close(modules.effective_weight(found[place]).detach(), weight, rtol=0, atol=1e-4)
    tokens_fingerprint = load_windows(windows).manifest.fingerprint
    assert read_manifest(node).calibration == {"windows": tokens_fingerprint}
    assert read_manifest(static).calibration == {"moments": tokens_fingerprint}


@torch.no_grad()
def by_hand(model: nn.Module, windows: Path, name: str, values: dict[str, Any]) -> dict[str, Tensor]:
    """The weights after compressing block after block, with the whole model run again before each."""
    used = method(name)
    tokens = torch.as_tensor(load_windows(windows).tokens).long()
    weights = {}
    for index, block in enumerate(blocks(model)):
        moments = {place: Moments() for place in modules.replaceable_modules(block)}
        hooks = [
            linear.register_forward_pre_hook(lambda _, inputs, sums=moments[place]: sums.add(inputs[0].flatten(0, 1)))
            for place, linear in modules.replaceable_modules(block).items()
        ]
        model(input_ids=tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        for place, linear in modules.replaceable_modules(block).items():
            weight = linear.weight.clone()
            made = used.layer.compress(
                Linear(weight, storage=torch.float32), moments[place].statistics(), used.validate_options(values)
            )
            weights[f"{index}.{place}"] = weight_of(made, weight)
            linear.weight.copy_(weights[f"{index}.{place}"])
    return weights


def test_sequential_statistics_change_nothing_for_a_method_without_statistics(root: Path, tmp_path: Path) -> None:
    nodes = [
        make(tmp_path / str(sequential), root, "rtn", bits=4, group_size=16, sequential=sequential)
        for sequential in (False, True)
    ]
    assert len({read_manifest(node).fingerprint for node in nodes}) == 1


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("shortgpt", "blocks", {"blocks": 1}),
        ("llm-pruner", "gradients", {"ratio": 0.25, "kv_ratio": 0}),
        ("llm-pruner", "gradients", {"ratio": 0, "kv_ratio": 0.5}),
    ],
)
def test_a_structure_method_is_surgery(
    root: Path, statistics: dict[str, Path], tmp_path: Path, name: str, kind: str, values: dict[str, Any]
) -> None:
    node = make(tmp_path / "node", root, name, list(statistics.values()), **values)
    used, model, tokens = method(name), load_model(root), tiny_tokens()
    folder = statistics[kind]
    tensors = read_statistics_file(folder, f"{kind}.safetensors", Statistics.read(folder / "manifest.json"))
    removal = used.structure.choose(
        SimpleNamespace(structure=surgery.structure(model)), tensors, used.validate_options(values)
    )
    achieved = surgery.describe_removal(model, removal)
    expected = surgery.remove(model, removal)
    assert torch.equal(logits(load_model(node), tokens), logits(expected, tokens))
    manifest = read_manifest(node)
    left = sum(parameter.numel() for parameter in expected.parameters())
    assert manifest.parameters.total == left
    assert manifest.rho == pytest.approx(1 - left / read_manifest(root).parameters.total)
    assert manifest.rho_blocks == pytest.approx(achieved["parameters"]["share_of_blocks"])
    assert manifest.achieved["units"] == achieved["units"]
    assert manifest.calibration.keys() == {kind}


def test_the_record_is_of_the_weights_as_stored(tmp_path: Path) -> None:
    """bfloat16 rounds what a method returns; the errors on record include that."""
    root = save_root(tmp_path / "root", num_hidden_layers=1, dtype=torch.bfloat16)
    windows = save_windows(tmp_path / "windows", root)
    moments = gather(root, windows, "moments", tmp_path / "moments")
    node = make(tmp_path / "node", root, "svd-llm", [moments], rank=14)
    before, after = (modules.replaceable_modules(blocks(load_model(path))) for path in (root, node))
    for place, entry in read_manifest(node).layers.items():
        name = place.removeprefix("model.layers.")
        wanted, new = (modules.effective_weight(each[name]).detach() for each in (before, after))
        assert entry["weight_error"] == pytest.approx(relative(new - wanted, wanted), rel=1e-4)


@pytest.fixture
def existing(root: Path, tmp_path: Path) -> Path:
    return make(tmp_path / "existing", root, "rtn", bits=8, group_size=16)


def test_a_layer_that_fails_is_named_and_the_node_stays(root: Path, existing: Path) -> None:
    before = contents(existing)
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj: A group size of 5 does not divide"):
        make(existing, root, "rtn", bits=4, group_size=5)
    assert contents(existing) == before


@pytest.mark.parametrize(("name", "values"), [STEPS["magnitude"], STEPS["svd"], STEPS["rtn"]], ids=str)
def test_a_weight_that_is_not_a_number_is_named(
    tmp_path: Path, existing: Path, name: str, values: dict[str, Any]
) -> None:
    model = tiny_model("qwen2", num_hidden_layers=2)
    blocks(model)[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    broken = save_root(tmp_path / "broken", model)
    before = contents(existing)
    with pytest.raises(UserError, match=r"^model\.layers\.1\.mlp\.up_proj: .* not (finite|numbers)"):
        make(existing, broken, name, **values)
    assert contents(existing) == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_a_full_disk_is_one_sentence_and_the_node_stays(
    root: Path, existing: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        raise error

    before = contents(existing)
    monkeypatch.setattr("coppice.models.checkpoint.save_torch_state_dict", full)
    with pytest.raises(UserError, match=r"existing could not be written: .*No space left on device"):
        make(existing, root, "rtn", bits=4, group_size=16)
    assert contents(existing) == before


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("wanda", {"sparsity": 0.5}, r"needs statistics of the kind 'moments'.* `coppice calibrate --kind moments`"),
        ("shortgpt", {"blocks": 1}, "needs statistics of the kind 'blocks'"),
        ("llm-pruner", {"ratio": 0.5}, "needs statistics of the kind 'gradients'"),
        ("gptq", {"bits": 4, "sequential": True}, "needs the calibration windows themselves; .* --tokens"),
        ("eora", {"rank": 2}, "needs statistics of the kind 'moments'"),
        ("full", {}, "trains its parent; .* `coppice recover`"),
    ],
)
def test_what_is_missing_is_named(root: Path, tmp_path: Path, name: str, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=rf"^Step '{name}' \({name}\) {sentence}"):
        make(tmp_path / "node", root, name, **values)
    assert not (tmp_path / "node").exists()


def test_a_reference_must_be_given_and_fit(root: Path, existing: Path, windows: Path, tmp_path: Path) -> None:
    moments = gather(existing, windows, "moments", tmp_path / "moments")
    with pytest.raises(UserError, match=r"from before the compression that it makes up for; .* --reference"):
        make(tmp_path / "node", existing, "eora", [moments], rank=2)
    wider = save_root(tmp_path / "wider", architecture="qwen2", num_hidden_layers=2, intermediate_size=64)
    with pytest.raises(UserError, match="has linears of other shapes than the parent"):
        make(tmp_path / "node", existing, "eora", [moments], rank=2, reference=wider)
