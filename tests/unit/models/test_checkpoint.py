"""Checkpoints: whole, strict, readable by stock loaders, and of one accounting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nodes import gather, make, save_root, save_tokenizer, save_windows
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, logits, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from coppice.errors import UserError
from coppice.files import read_json, write_json
from coppice.models import modules
from coppice.models.checkpoint import load_model, read_manifest
from coppice.models.densify import export_dense
from coppice.models.sources import import_root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A root with its windows and moments, and a node of every kind of storage."""
    base = tmp_path_factory.mktemp("nodes")
    root = save_root(base / "root", architecture="qwen2")
    windows = save_windows(base / "windows", root)
    moments = gather(root, windows, "moments", base / "moments")
    gptq = {"bits": 4, "group_size": 16, "symmetric": False}
    nodes = {
        "root": root,
        "masked": make(base / "masked", root, "wanda", [moments], sparsity=0.5),
        "symmetric": make(base / "symmetric", root, "rtn", bits=3, group_size=16, symmetric=True),
        "asymmetric": make(base / "asymmetric", root, "gptq", [moments], **gptq),
        "factorized": make(base / "factorized", root, "svd-llm", [moments], keep=0.6),
    }
    quantized_moments = gather(nodes["symmetric"], windows, "moments", base / "quantized-moments")
    spread = {"by": "water-filling", "floor": 0.25}
    nodes["compensated"] = make(
        base / "compensated", nodes["symmetric"], "eora", [quantized_moments], rank=3, allocation=spread, reference=root
    )
    nodes["factors-quantized"] = make(base / "factors-quantized", nodes["factorized"], "rtn", bits=8, group_size=-1)
    nodes["codebook"] = make(base / "codebook", root, "k-bit", bits=4, outliers=0.1)
    nodes["remapped"] = make(base / "remapped", root, "dobi-svd", [moments], keep=0.5, learn=False)
    nodes["skeleton"] = make(base / "skeleton", root, "curing", [moments], rank=4)
    nodes["sites"] = make(base / "sites", root, "compactifai", keep=0.5, sites=3)
    nodes["flattened"] = make(base / "flattened", root, "flattenquant", [moments], bits=8)
    nodes["inputs"] = make(base / "inputs", nodes["symmetric"], "activation-quant", bits=6)
    nodes["cache"] = make(base / "cache", nodes["inputs"], "gear", bits=4, group_size=4, buffer=4)
    nodes["rotated"] = make(base / "rotated", root, "rotate")
    return nodes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_root_of_every_architecture_comes_back(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied)
    folder = save_root(tmp_path / "root", model)
    tokens = tiny_tokens()
    assert torch.equal(logits(load_model(folder), tokens), logits(model, tokens))
    manifest = read_manifest(folder)
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert manifest.parameters.total == sum(unique.values())
    assert (manifest.rho, manifest.bits_per_weight) == (0, 32)


@pytest.mark.parametrize("node", ["masked", "symmetric", "asymmetric", "rotated"])
def test_stock_loaders_read_masked_and_quantized_nodes(folders: dict[str, Path], node: str) -> None:
    tokens = tiny_tokens()
    stock = AutoModelForCausalLM.from_pretrained(folders[node], dtype=torch.float32)
    ours = logits(load_model(folders[node]), tokens)
    assert torch.allclose(logits(stock, tokens), ours, atol=1e-5)
    changed = not torch.allclose(ours, logits(load_model(folders["root"]), tokens), atol=1e-2)
    # A rotation changes every weight and no output.
    assert changed == (node != "rotated")


CARRYING = (
    "factorized",
    "compensated",
    "factors-quantized",
    "codebook",
    "remapped",
    "skeleton",
    "sites",
    "flattened",
    "inputs",
    "cache",
)


def test_a_process_without_coppice_reads_nodes_by_the_code_they_carry(folders: dict[str, Path], tmp_path: Path) -> None:
    tokens = tiny_tokens()
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    script = f"""
import sys; sys.modules["coppice"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens = load_file("tokens.safetensors")["tokens"]
found = {{}}
for node, folder in { ({node: str(folders[node]) for node in CARRYING})!r}.items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        found[node] = model(tokens).logits
save_file(found, "logits.safetensors")
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)
    theirs, dense = load_file(tmp_path / "logits.safetensors"), logits(load_model(folders["root"]), tokens)
    for node in CARRYING:
        ours = logits(load_model(folders[node]), tokens)
        assert torch.allclose(theirs[node], ours, atol=1e-5), node
        assert not torch.allclose(ours, dense, atol=1e-3), node


def test_the_carried_code_is_a_copy_of_the_files_that_the_node_needs(folders: dict[str, Path]) -> None:
    sources = Path(modules.__file__).parent
    needed = {
        "factorized": {"low_rank"},
        "factors-quantized": {"low_rank", "quantized"},
        "compensated": {"low_rank_correction", "low_rank", "quantized"},
        "flattened": {"flatten_quant"},
    }
    for node, forms in needed.items():
        common = {"base", "finding", "activation_quantization", "kv_cache", "packing"}
        carried = {path.stem: path for path in folders[node].glob("*.py") if path.stem != "modeling_coppice"}
        assert carried.keys() == forms | common
        assert all(path.read_bytes() == (sources / path.name).read_bytes() for path in carried.values())
    assert not list(folders["symmetric"].glob("*.py"))


@pytest.mark.parametrize(
    "node", ["masked", "symmetric", "asymmetric", "factorized", "compensated", "factors-quantized"]
)
def test_every_node_exports_to_dense(folders: dict[str, Path], node: str, tmp_path: Path) -> None:
    export_dense(folders[node], tmp_path / "dense")
    tokens = tiny_tokens()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.allclose(logits(stock, tokens), logits(load_model(folders[node]), tokens), atol=1e-4)
    assert read_json(tmp_path / "dense" / "compression.json") == {}


def test_the_accounting_counts_stored_bytes(folders: dict[str, Path]) -> None:
    root, symmetric = read_manifest(folders["root"]), read_manifest(folders["symmetric"])
    masked, factorized = read_manifest(folders["masked"]), read_manifest(folders["factorized"])
    # A mask of zeros saves nothing, and says so.
    assert masked.stored_bits == root.stored_bits
    assert masked.parameters.nonzero == root.parameters.total - root.parameters.decoder_linears // 2
    # q, k, v, o, gate, up and down of 3 blocks: 3 bits in whole words, a scale of 32 bits for 16 weights, biases apart.
    shapes = [
        (m.out_features, m.in_features) for m in modules.weight_matrices(tiny_model("qwen2").model.layers[0]).values()
    ]
    words = sum(rows * (modules.packed_words(columns, 3) + columns // 16) for rows, columns in shapes)
    biases = 32 + 16 + 16
    shape_tensors = 7 * 2 * 64
    assert symmetric.stored_bits.decoder_linears == 3 * (32 * (words + biases) + shape_tensors)
    assert symmetric.parameters.total == root.parameters.total
    ranks = {name: entry["rank"] for name, entry in read_json(folders["factorized"] / "compression.json").items()}
    assert factorized.parameters.total == root.parameters.total - sum(
        m.in_features * m.out_features - ranks[name] * (m.in_features + m.out_features)
        for name, m in tiny_model("qwen2").named_modules()
        if name in ranks
    )


def test_the_adapter_of_a_compensated_node_gives_its_logits_through_peft(folders: dict[str, Path]) -> None:
    from peft import PeftModel

    exported = folders["symmetric"].with_name("symmetric-dense")
    export_dense(folders["symmetric"], exported)
    parent = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    written = read_json(folders["compensated"] / "adapter" / "adapter_config.json")
    assert written["rank_pattern"] == written["alpha_pattern"]
    assert len(set(written["rank_pattern"].values())) > 1
    adapted = PeftModel.from_pretrained(parent, folders["compensated"] / "adapter").eval()
    tokens = tiny_tokens()
    assert torch.allclose(logits(adapted, tokens), logits(load_model(folders["compensated"]), tokens), atol=1e-4)


def test_one_changed_bit_is_refused(tmp_path: Path) -> None:
    folder = save_root(tmp_path / "root")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not the file that its manifest describes"):
        load_model(folder)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    folder = save_root(tmp_path / "root")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing; recompute the node 'tiny'"):
        load_model(folder)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense model as somebody else would have saved it."""
    folder = tmp_path / "dense"
    tiny_model().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_a_dense_folder_becomes_a_root(dense: Path, tmp_path: Path) -> None:
    import_root("tiny", {"path": str(dense)}, 0, tmp_path / "root")
    tokens = tiny_tokens()
    assert torch.equal(logits(load_model(tmp_path / "root"), tokens), logits(tiny_model(), tokens))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("truncate", r"model\.safetensors is not a whole safetensors file"),
        ("drop", r"do not fit its config\.json: model\.norm\.weight is missing"),
        ("add", r"do not fit its config\.json: model\.extra is unexpected"),
        ("reshape", r"model\.norm\.weight has shape \(3,\) instead of \(32,\)"),
        ("nan", r"model\.norm\.weight in .* holds NaN or infinite values"),
        (
            "architecture",
            r"Architecture 'gpt2' is not supported; supported are llama, mistral, olmo2, ",
        ),
        ("quantized", r"is already quantized; a root must be dense"),
        ("vocabulary", r"tokenizer in .* has ids up to 60 but the model's vocabulary is 50"),
        ("tokenizer", r"has no tokenizer\.json"),
        ("pickle", r"holds no model\*\.safetensors"),
    ],
)
def test_a_damaged_root_is_refused_and_nothing_is_written(
    dense: Path, tmp_path: Path, damage: str, sentence: str
) -> None:
    weights = dense / "model.safetensors"
    tensors = load_file(weights)
    config = read_json(dense / "config.json")
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pickle":
        weights.rename(dense / "pytorch_model.bin")
    elif damage == "tokenizer":
        (dense / "tokenizer.json").unlink()
    elif damage == "vocabulary":
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:50].clone()
        save_file(tensors, weights)
        write_json(dense / "config.json", config | {"vocab_size": 50})
    elif damage in ("architecture", "quantized"):
        changed = {"architecture": {"model_type": "gpt2"}, "quantized": {"quantization_config": {}}}[damage]
        write_json(dense / "config.json", config | changed)
    else:
        norm = tensors.pop("model.norm.weight")
        tensors |= {
            "drop": {},
            "add": {"model.norm.weight": norm, "model.extra": norm.clone()},
            "reshape": {"model.norm.weight": norm[:3].clone()},
            "nan": {"model.norm.weight": norm / 0 * 0},
        }[damage]
        save_file(tensors, weights)
    with pytest.raises(UserError, match=sentence):
        import_root("tiny", {"path": str(dense)}, 0, tmp_path / "root")
    assert not (tmp_path / "root" / "manifest.json").exists()


def test_a_hub_model_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = {"hub": "nobody/nothing", "revision": "0" * 40}
    with pytest.raises(UserError, match=r"Model nobody/nothing at revision 0{40} could not be downloaded"):
        import_root("tiny", source, 0, tmp_path / "root")
