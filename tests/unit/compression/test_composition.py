"""Any method after any other: refused with a reason before anything runs, or a whole and honest node."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import gather, make, save_root, save_windows
from rows import ROWS
from safetensors.torch import load_file
from studies import tiny_folder
from tiny import logits, tiny_tokens
from torch import Tensor, nn

from coppice.compression.stage import compress
from coppice.errors import UserError
from coppice.files import read_json
from coppice.methods.registry import method
from coppice.models import modules
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import load_model, read_manifest
from coppice.models.contracts import linear_seed
from coppice.models.densify import export_dense
from coppice.records.manifest import Manifest
from coppice.study import tree
from coppice.study.schema import Study

ALL: dict[str, dict[str, Any]] = {name: options[0] for name, options in ROWS.items()}
# Each method twice in a row is another budget on what is left, so a method that removes units is asked for shares.
BASIC = ("shortgpt", "llm-pruner", "magnitude", "wanda", "sparsegpt", "svd", "svd-llm", "rtn", "gptq", "eora")
# Of the others, each is made after one step of each kind and before two; not every pair of them says something new.
OTHERS = [name for name in ALL if name not in BASIC]
PAIRS = [(first, f"{second}-again") for first, second in product(BASIC, BASIC)]
BESIDE = [
    steps
    for name in OTHERS
    for steps in (
        *((before, name) for before in ("wanda", "svd-llm", "gptq", "eora", "llm-pruner")),
        (name, f"{name}-again"),
        *((name, after) for after in ("gptq", "eora")),
    )
]
TRIPLES = [
    ("wanda", "rtn", "eora"),
    ("sparsegpt", "gptq", "shortgpt"),
    ("svd-llm", "wanda", "gptq"),
    ("svd", "rtn", "eora"),
    ("shortgpt", "sparsegpt", "gptq"),
    ("llm-pruner", "wanda", "svd"),
    ("llm-pruner", "wanda", "rtn"),
    ("magnitude", "eora", "shortgpt"),
    ("wanda", "eora", "llm-pruner"),
    ("rotate", "obr", "eora"),
    ("curing", "wanda", "gptq"),
    ("compactifai", "sparsegpt", "rtn"),
    ("gptq", "activation-quant", "kv-cache"),
    ("kv-cache", "gptq", "eora"),
    ("activation-quant", "svd", "rtn"),
]


def base(step: str) -> str:
    """The method of a step."""
    return step.removesuffix("-again")


class Workshop:
    """Nodes of a tiny model by their path, each made once, as the workflow would make them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.folders = {"tiny": save_root(directory / "root", num_hidden_layers=2)}
        # 9 windows of 16 tokens, three times as many as the widest linear has inputs: no second moment is singular.
        self.windows = save_windows(directory / "windows", self.folders["tiny"], documents=10)
        calibration = {"text": "biographies", "windows": 4, "length": 32}
        self.study = Study.model_validate(
            {
                "study": "composition",
                "models": {"tiny": {"path": str(tiny_folder(directory))}},
                "texts": {"biographies": {"builtin": "biographies", "people": 50}},
                "calibrations": {"default": calibration},
                "steps": {
                    f"{name}{suffix}": {"method": name, **options}
                    for name, options in ALL.items()
                    for suffix in ("", "-again")
                },
                "recipes": [list(steps) for steps in (*PAIRS, *BESIDE, *TRIPLES)],
            }
        )
        self.refusals = tree.incompatibilities(self.study)

    def refusal(self, steps: tuple[str, ...]) -> str | None:
        """Why the study cannot ask for these steps."""
        return next((sentence for sentence in self.refusals if f" ({' > '.join(steps)}): " in sentence), None)

    def statistics(self, node: str, step: str) -> list[Path]:
        return [self.gathered(node, kind) for kind in tree.kinds(self.study, step)]

    @cache  # noqa: B019
    def gathered(self, node: str, kind: str) -> Path:
        folder = self.directory / "statistics" / node / kind
        return gather(self.node(node), self.windows, kind, folder)

    def node(self, name: str) -> Path:
        if name not in self.folders:
            parent, _, step = name.rpartition("/")
            self.folders[name] = self.make(parent, step, self.directory / "models" / name)
        return self.folders[name]

    @cache  # noqa: B019
    def model(self, name: str) -> nn.Module:
        """A parent's model, to be looked at."""
        return load_model(self.node(name))

    def make(self, parent: str, step: str, folder: Path, **changes: Any) -> Path:
        inputs = {"statistics": self.statistics(parent, step)} | changes
        if method(base(step)).family == "compensate":
            inputs["reference"] = self.node(tree.reference(self.study, parent))
        if tree.reads_windows(self.study.steps[step]):
            inputs["tokens"] = self.windows
        options = ALL[base(step)]
        compress(
            f"{parent}/{step}",
            self.node(parent),
            {"name": step, "method": base(step), "options": options},
            folder,
            **inputs,
        )
        return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("composition"))


@pytest.mark.parametrize("steps", [*PAIRS, *BESIDE, *TRIPLES], ids=" > ".join)
def test_steps_compose_or_are_refused(workshop: Workshop, steps: tuple[str, ...], tmp_path: Path) -> None:
    parent, node = "/".join(("tiny", *steps[:-1])), "/".join(("tiny", *steps))
    reason = workshop.refusal(steps)
    if reason is None:
        computed = check_node(workshop, parent, node)
        check_export(workshop.node(node), computed, tmp_path / "dense")
        return
    if "nothing to compensate" in reason:
        assert base(steps[-1]) == "eora" or steps[0] == "eora"
        return
    with pytest.raises(UserError) as raised:
        make(tmp_path / "node", workshop.node(parent), base(steps[-1]), **ALL[base(steps[-1])])
    assert str(raised.value).partition(" because ")[2] == reason.partition(" because ")[2]
    assert not (tmp_path / "node").exists()


def check_node(workshop: Workshop, parent: str, node: str) -> Tensor:
    """Its logits, once all is found to be as the manifest says."""
    folder = workshop.node(node)
    manifest, model = read_manifest(folder), load_model(folder)
    assert manifest.traits == sorted(tree.traits(workshop.study, node))
    computed = logits(model, tiny_tokens())
    assert torch.isfinite(computed).all()
    check_modules(workshop.model(parent), model, manifest)
    check_accounting(folder, model, manifest, read_manifest(workshop.folders["tiny"]))
    return computed


def check_modules(before: nn.Module, after: nn.Module, manifest: Manifest) -> None:
    """What was masked stays zero; what was asked for is in every place; traits say what is there."""
    step = base(manifest.step.method)
    # By the name that each had before a compensation came beside it.
    own = {
        name.replace(".base", ""): linear
        for name, linear in modules.weight_matrices(blocks(after)).items()
        if ".compensation." not in name
    }
    if method(step).contract == "layer":
        for name, linear in modules.weight_matrices(blocks(before)).items():
            zero = linear.weight == 0
            if zero.any() and getattr(linear, "masked", False):
                weight = own[name].weight
                assert (weight[zero] == 0).all()
                assert (weight != 0).any()
        assert {place.removeprefix("model.layers.") for place in manifest.layers} <= (
            modules.replaceable_modules(blocks(before)) | modules.weight_matrices(blocks(before))
        ).keys()
    quantized = [isinstance(linear, modules.PackedForm) for linear in own.values()]
    assert all(quantized) if "quantized" in manifest.traits else not any(quantized)
    rounded = [
        isinstance(each, modules.FlattenQuantLinear) or hasattr(each, "quantized_activations") for each in own.values()
    ]
    assert all(rounded) if "quantized-activations" in manifest.traits else not any(rounded)
    assert hasattr(after.model, "cache_settings") == ("quantized-cache" in manifest.traits)
    kinds = [type(module) for module in modules.replaceable_modules(blocks(after)).values()]
    assert all(kind is modules.LowRankCorrectionLinear for kind in kinds) == ("compensated" in manifest.traits)
    factors = [
        isinstance(each, (modules.LowRankLinear, modules.CURLinear, modules.TensorTrainLinear))
        for each in after.modules()
    ]
    assert any(factors) == bool({"factorized", "compensated"} & set(manifest.traits))
    zeros = [bool((linear.weight == 0).any()) for linear in own.values()]
    assert "masked" not in manifest.traits or all(zeros)
    for linear in own.values():
        if isinstance(linear, modules.QuantizedLinear):
            groups = linear.weight.view(-1, linear.in_features // linear.weight_scale.shape[1])
            assert all(len(group.unique()) <= 2**linear.bits for group in groups)


def check_accounting(folder: Path, model: nn.Module, manifest: Manifest, root: Manifest) -> None:
    """The manifest's numbers, counted again from the file and the modules."""
    tensors = load_file(folder / "model.safetensors")
    assert manifest.stored_bits.total == 8 * sum(each.numel() * each.element_size() for each in tensors.values())
    assert manifest.stored_bytes == (folder / "model.safetensors").stat().st_size
    assert 8 * manifest.stored_bytes > manifest.stored_bits.total > manifest.stored_bits.decoder_linears
    matrices = modules.weight_matrices(blocks(model)).values()
    packed = [linear for linear in matrices if isinstance(linear, modules.PackedForm)]
    numbers = sum(parameter.numel() for parameter in model.parameters()) + sum(
        linear.in_features * linear.out_features for linear in packed
    )
    zeros = sum(int((linear.weight == 0).sum()) for linear in matrices)
    parameters, dense = manifest.parameters, root.parameters
    assert (parameters.total, parameters.nonzero) == (numbers, numbers - zeros)
    assert parameters.decoder_linears == sum(linear.in_features * linear.out_features for linear in matrices)
    assert dict(manifest.dense) == {key: getattr(dense, key) for key in ("total", "blocks", "decoder_linears")}
    assert manifest.rho == pytest.approx(1 - numbers / dense.total)
    assert manifest.bits_per_weight == pytest.approx(manifest.stored_bits.total / dense.total)
    # Codes take their bits, and nothing is stored in fewer than the grid has.
    assert manifest.stored_bits.decoder_linears >= sum(
        (linear.bits if isinstance(linear, modules.PackedForm) else 32) * linear.in_features * linear.out_features
        for linear in matrices
    )


def check_export(folder: Path, computed: Tensor, dense: Path) -> None:
    if {"quantized-activations", "quantized-cache"} & set(read_manifest(folder).traits):
        with pytest.raises(UserError, match="which a dense checkpoint cannot hold"):
            export_dense(folder, dense)
        return
    export_dense(folder, dense)
    model = load_model(dense)
    assert torch.allclose(logits(model, tiny_tokens()), computed, atol=1e-3, rtol=1e-4)
    assert read_json(dense / "compression.json") == {}
    assert all(type(linear) is nn.Linear for linear in modules.weight_matrices(blocks(model)).values())


def test_an_exported_node_can_be_compressed_again(workshop: Workshop, tmp_path: Path) -> None:
    export_dense(workshop.node("tiny/svd"), tmp_path / "dense")
    node = make(tmp_path / "node", tmp_path / "dense", "rtn", bits=4, group_size=-1)
    manifest = read_manifest(node)
    assert manifest.traits == ["quantized"]
    assert manifest.dense == read_manifest(workshop.node("tiny")).dense


@pytest.mark.parametrize("step", ALL)
def test_weights_follow_the_seed_of_the_study_where_a_method_draws(
    workshop: Workshop, step: str, tmp_path: Path
) -> None:
    """torch's own seed changes nothing; the study's changes nothing either, unless the method declares `draws`."""
    seed = 0 if method(step).declaration.draws else 7
    parent = "tiny/rtn" if method(step).family == "compensate" else "tiny"
    first = read_manifest(workshop.node(f"{parent}/{step}"))
    torch.manual_seed(1)
    second = read_manifest(workshop.make(parent, step, tmp_path / "node", seed=seed))
    assert second.fingerprint == first.fingerprint
    assert (first.seed, second.seed) == (0, seed)


def test_linears_draw_different_numbers_in_any_order() -> None:
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(3)]
    seeds = [linear_seed(7, name) for name in names]
    assert len({*seeds, *(linear_seed(8, name) for name in names)}) == 6
    assert seeds == [linear_seed(7, name) for name in names]
    assert all(0 <= seed < 2**63 for seed in seeds)
