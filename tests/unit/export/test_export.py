"""Exports: each read back by the reader of its format, with the node's own logits, or refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import quantized_linear
from nodes import gather, make, save_root, save_windows
from safetensors.torch import load_file
from tiny import logits, tiny_model, tiny_tokens

from coppice.cli import main
from coppice.errors import UserError
from coppice.export import check, gguf
from coppice.export.stage import export
from coppice.files import read_json, write_json
from coppice.models.architectures.base import architecture, model_types
from coppice.models.checkpoint import load_model, read_manifest


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A root and a node of every kind of storage, of a model whose grids fit blocks of 32 weights."""
    base = tmp_path_factory.mktemp("nodes")
    # Rotary frequencies that are not the usual ones have to reach the readers too.
    rotary = {"rope_type": "default", "rope_theta": 500.0}
    shape = {"num_hidden_layers": 2, "intermediate_size": 64, "rope_parameters": rotary}
    root = save_root(base / "root", **shape)
    windows = save_windows(base / "windows", root)
    nodes = {
        "root": root,
        "masked": make(base / "masked", root, "magnitude", sparsity=0.5),
        "factorized": make(base / "factorized", root, "svd", keep=0.6),
        "symmetric": make(base / "symmetric", root, "rtn", bits=4, group_size=16, symmetric=True),
    }
    for name in ("symmetric", "masked"):
        moments = gather(nodes[name], windows, "moments", base / f"{name}-moments")
        nodes[f"{name}-compensated"] = make(
            base / f"{name}-compensated", nodes[name], "eora", [moments], rank=3, reference=root
        )
    # What is refused before work is told by a node's JSON alone.
    nodes["codebook"] = described(base / "codebook", root, "compression.json", {"model.layers.0": {"type": "Codebook"}})
    nodes["inputs"] = described(base / "inputs", root, "manifest.json", {"traits": ["quantized-activations"]})
    half = save_root(base / "half", dtype=torch.bfloat16, **shape)
    nodes["half"] = make(base / "half-quantized", half, "rtn", bits=3, group_size=32, symmetric=False)
    return nodes


def described(folder: Path, node: Path, file: str, changes: dict[str, Any]) -> Path:
    """The JSON of another node, with changes in one of its files."""
    folder.mkdir()
    for name in ("config.json", "compression.json", "manifest.json"):
        shutil.copy(node / name, folder / name)
    write_json(folder / file, {**read_json(node / file), **changes})
    return folder


@pytest.fixture(scope="module")
def exported(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a node's export, which tests may read and none may change."""
    base = tmp_path_factory.mktemp("exports")

    @cache
    def written(node: str, to: str) -> Path:
        export(folders[node], to, base / node / to)
        return base / node / to

    return written


@pytest.mark.parametrize(
    ("node", "to"),
    [
        ("factorized", "dense"),
        ("half", "compressed-tensors"),
        ("masked-compensated", "peft"),
    ],
)
def test_an_export_gives_the_logits_of_its_node(
    folders: dict[str, Path], exported: Callable[[str, str], Path], node: str, to: str
) -> None:
    out = exported(node, to)
    written = read_json(out / "export.json")
    assert (written["format"], written["node"]) == (to, read_manifest(folders[node]).node)
    assert written["fingerprint"] == read_manifest(folders[node]).fingerprint
    assert written["difference"]["largest"] < (0.2 if node == "half" else 1e-4)
    assert not any(path.suffix in {".bin", ".pt", ".pkl"} for path in out.rglob("*"))


def test_the_command_takes_a_node_and_its_reader_gives_the_logits_on_other_tokens_too(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    (results / "models" / "tiny").mkdir(parents=True)
    shutil.copytree(folders["symmetric"], results / "models" / "tiny" / "rtn-4")
    words = ["export", "rtn-4", "--results", str(results), "--to", "gguf", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "as gguf, read back by transformers. Over 222 tokens" in said
    assert "nats (tolerance 0.001), and" in said
    assert "holds no tokenizer" in said
    for wrong, sentence in (
        (["--model", str(folders["root"])], "Pass a node's name and --results, or --model"),
        (["--tolerance", "-1"], "--tolerance -1 means nothing"),
    ):
        assert main([*words, *wrong]) == 1
        assert sentence in capsys.readouterr().err
    assert main(["export", "tiny/rnt-4", *words[2:]]) == 1
    assert "There is no node 'tiny/rnt-4'. Did you mean 'tiny/rtn-4'?" in capsys.readouterr().err
    log = results / "logs" / "compress" / "tiny" / "rtn-3.log"
    log.parent.mkdir(parents=True)
    log.write_text("error: Its bits are too few.\n")
    assert main(["export", "tiny/rtn-3", *words[2:]]) == 1
    sentence = f"The node 'tiny/rtn-3' has no checkpoint: compress (Its bits are too few.), by {log}"
    assert sentence in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*words[:-1], str(tmp_path / "file" / "below")]) == 1
    assert "Not a directory; pass another --output" in capsys.readouterr().err
    ours = logits(load_model(folders["symmetric"]), tiny_tokens())
    assert torch.allclose(logits(gguf.load(tmp_path / "out").eval(), tiny_tokens()), ours, atol=1e-4)
    assert not torch.allclose(logits(load_model(folders["root"]), tiny_tokens()), ours, atol=0.1)


# What makes an architecture's tiny model harder to write.
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    "qwen2": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("model_type", [name for name in model_types() if architecture(name).gguf])
def test_gguf_holds_every_architecture_that_says_so(tmp_path: Path, model_type: str) -> None:
    root = save_root(tmp_path / "root", tiny_model(model_type, num_hidden_layers=1, **CHANGES.get(model_type, {})))
    assert export(root, "gguf", tmp_path / "out").largest < 1e-4


def test_gguf_keeps_a_grid_in_blocks_without_rounding(folders: dict[str, Path], tmp_path: Path) -> None:
    found = export(folders["half"], "gguf", tmp_path / "out")
    assert found.largest < 1e-5
    from gguf import GGUFReader

    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert {kinds[f"blk.1.{name}.weight"] for name in ("attn_q", "attn_output", "ffn_down")} == {"Q4_0"}
    assert (kinds["token_embd.weight"], kinds["output_norm.weight"]) == ("BF16", "F32")


@pytest.mark.parametrize(
    ("bits", "symmetric", "scale", "kind"),
    [
        (4, True, 0.5, "Q4_0"),
        (3, False, 0.5, "Q4_0"),
        (8, True, 0.5, "Q8_0"),
        (7, False, 0.5, "Q8_0"),
        (8, False, 0.5, None),  # a level of 255
        (4, True, 0.1, None),  # a scale that float16 rounds
    ],
)
def test_blocks_hold_a_grid_exactly_or_not_at_all(bits: int, symmetric: bool, scale: float, kind: str | None) -> None:
    from gguf import GGMLQuantizationType, dequantize

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (4, 128), generator=generator, dtype=torch.int32)
    codes[0, :2] = torch.tensor([0, 2**bits - 1])
    zeros = torch.zeros(4, 2, dtype=torch.int32)
    codes = codes - 2 ** (bits - 1) if symmetric else codes
    scales = scale * torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.25, 8.0], [1.0, 1.0]])
    linear = quantized_linear(codes, scales, zeros, bits, 64, symmetric, None)
    stored = gguf.in_blocks(linear.weight, linear.weight_scale)
    assert (stored and stored.kind) == kind
    if kind:
        back = dequantize(stored.data, GGMLQuantizationType[kind])
        assert torch.equal(torch.from_numpy(back), linear.weight)


def test_compressed_tensors_holds_what_its_library_describes(
    folders: dict[str, Path], exported: Callable[[str, str], Path]
) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    for node, asymmetric in (("symmetric", False), ("half", True)):
        out = exported(node, "compressed-tensors")
        config = read_json(out / "config.json")["quantization_config"]
        assert config.pop("dequantize", False) == asymmetric
        (group,) = QuantizationConfig.model_validate(config).config_groups.values()
        assert (group.targets, group.weights.symmetric) == (["Linear"], not asymmetric)
        assert not (out / "compression.json").exists()
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (folders[node], out))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_keeps_its_base_packed(folders: dict[str, Path], tmp_path: Path) -> None:
    export(folders["symmetric-compensated"], "peft", tmp_path)
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(tmp_path / "base" / "model.safetensors")
    assert read_json(tmp_path / "adapter_config.json")["base_model_name_or_path"] == "base"
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "export.json",
    }


@pytest.mark.parametrize(
    ("node", "to", "reason"),
    [
        ("root", "compressed-tensors", "none of its linears is quantized; export it to dense"),
        ("masked", "compressed-tensors", "its zeros are stored as numbers"),
        ("codebook", "compressed-tensors", "the node holds Codebook; export it to dense"),
        ("symmetric-compensated", "compressed-tensors", "export it to peft"),
        ("factorized", "peft", "its linears have no low-rank corrections"),
        ("inputs", "gguf", "rounds the inputs of its linears while it runs, which GGUF cannot hold"),
        ("inputs", "compressed-tensors", "export the node from before that step"),
    ],
)
def test_what_a_format_cannot_say_is_refused_before_work(
    folders: dict[str, Path], node: str, to: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        export(folders[node], to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "of type linear"),
        ("llama", {"attention_bias": True}, "no biases of a llama"),
        ("mistral", {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 64}, "looks back 64 tokens"),
        ("mistral", {}, "cannot be 32 wide with 6 heads"),
        ("smollm3", {}, "reads no smollm3 from GGUF"),
    ],
)
def test_gguf_refuses_what_its_reader_passes_over(
    architecture: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    root = save_root(tmp_path / "root", tiny_model(architecture, num_hidden_layers=1, **changes))
    with pytest.raises(UserError, match=f"{reason}.*convert_hf_to_gguf"):
        export(root, "gguf", tmp_path / "out")


def test_other_logits_are_refused_and_leave_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "neighbours", lambda rows, heads: slice(None))
    with pytest.raises(UserError, match=r"gives other logits than the node: log-probabilities differ by up to"):
        export(folders["root"], "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(folders["root"], "gguf", tmp_path / "out", tolerance=100).largest > 0.1
    monkeypatch.setattr(gguf, "FILE", "other.gguf")
    monkeypatch.setattr(gguf, "load", lambda folder: (folder / "none").read_text())
    with pytest.raises(UserError, match=r"transformers cannot read the export \(.*No such file"):
        export(folders["root"], "gguf", tmp_path / "out")
    # The export from before is as it was.
    assert {path.name for path in (tmp_path / "out").glob("*.gguf")} == {"model.gguf"}


def test_an_export_is_written_over_its_like_alone(
    folders: dict[str, Path], exported: Callable[[str, str], Path], tmp_path: Path
) -> None:
    shutil.copytree(exported("factorized", "dense"), tmp_path / "out")
    export(folders["root"], "dense", tmp_path / "out")
    assert read_json(tmp_path / "out" / "export.json")["node"] == "tiny"
    with pytest.raises(UserError, match="out holds other files; pass an empty folder"):
        export(folders["root"], "gguf", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    with pytest.raises(UserError, match="mine holds other files"):
        export(folders["root"], "dense", tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep"


def test_a_difference_is_what_its_definition_says() -> None:
    ours = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).double().log()
    theirs = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).double().log()
    found = check.compute_difference(ours, theirs)
    assert found.largest == pytest.approx(math.log(3))
    assert found.divergence == pytest.approx(0.5 * (0.25 * math.log(1 / 3) + 0.75 * math.log(3)))
    assert found.tokens == 2
    broken = check.Difference(math.nan, math.nan, 1)
    assert not check.within(broken, check.Tolerance(math.inf, math.inf))
    assert not check.within(check.Difference(0.5, 0.1, 1), check.tolerance(True, torch.bfloat16))
    assert [batch.shape for batch in check.batches(61, 10)] == [(3, 1), (3, 9), (3, 10)]
