"""To GGUF: one file of tensors and metadata, as llama.cpp reads it.

Names, types and keys are those of the package `gguf`; the file is read back by transformers. llama.cpp's own converter
is a script of its repository. Rotary embeddings turn neighbours in llama.cpp's `llama` and halves in transformers, so
that rows of q and k are reordered there.

Integer grids that ggml's blocks hold without rounding are stored as such blocks: 32 weights of a row with one scale d
in float16, w = d level, level in -8 .. 7 (Q4_0) or -128 .. 127 (Q8_0).
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coppice.export import gguf_tokenizer, gguf_vocabulary
from coppice.export.node import Node, Written
from coppice.models import modules
from coppice.models.architectures.base import Gguf, architecture, architecture_of, blocks, head_dim
from coppice.models.checkpoint import TOKENIZER_FILES, load_model
from coppice.models.densify import densify

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedModel

HOLDER = "GGUF"
READER = "transformers"
FILE = "model.gguf"
BLOCK = 32
FLOATS = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}
CONVERTER = "export it to dense and convert that with convert_hf_to_gguf.py of llama.cpp"
# Where a model's name holds one of these, llama.cpp treats special tokens as that family does, or refuses the file.
NAMED_FAMILIES = ("phi-3", "phi3", "modern-bert")


class Stored(NamedTuple):
    """A tensor as the file holds it; kind: name of one of `gguf.GGMLQuantizationType`, of a block type as bytes."""

    data: np.ndarray
    kind: str


def reason_against(node: Node) -> str | None:
    """Why the node has no such form, and what to do instead."""
    if importlib.util.find_spec("gguf") is None:
        return "the package gguf is not installed; pip install 'coppice[gguf]'"
    config = node.config
    holder = architecture(config["model_type"]).gguf
    if holder is None:
        return f"transformers reads no {config['model_type']} from GGUF, so that nothing could be checked; {CONVERTER}"
    rope = config.get("rope_parameters", {}).get("rope_type", "default")
    if rope != "default":
        return f"rotary embeddings of type {rope} are not written here; {CONVERTER}"
    name, width, heads = holder.name, config["hidden_size"], config["num_attention_heads"]
    unchecked = f"so that nothing could be checked; {CONVERTER}"
    if not holder.reads_biases and (config.get("attention_bias") or config.get("mlp_bias")):
        return f"transformers reads no biases of a {name} from GGUF, {unchecked}"
    if holder.heads_divide and width % heads:
        return (
            f"transformers reads it from GGUF as a {name}, which cannot be {width} wide with {heads} heads, {unchecked}"
        )
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        return f"its attention looks back {window} tokens only, which GGUF's architecture does not express; {CONVERTER}"
    return None


def holder_of(model_type: str) -> Gguf:
    """How GGUF holds an architecture. Raises KeyError for one that it does not hold; `reason_against` refuses it."""
    holder = architecture(model_type).gguf
    if holder is None:
        raise KeyError(model_type)
    return holder


def write(node: Node, folder: Path) -> Written:
    import gguf

    vocabulary, notes = gguf_tokenizer.read(node.folder, node.config["vocab_size"])
    model = load_model(node.folder, dtype=torch.float32)
    packed = packed_linears(model)
    replaced = {name for name, form in node.forms.items() if not form.keeps_linear}
    densify(model)
    writer = gguf.GGUFWriter(folder / FILE, holder_of(node.config["model_type"]).name)
    kinds = {stored.kind for stored in packed.values()}
    common = f"MOSTLY_{max(kinds)}" if kinds else FLOATS[node.dtype][1]
    write_metadata(writer, model.config, node.name, gguf.LlamaFileType[common])
    gguf_vocabulary.write(writer, vocabulary)
    for name, stored in stored_tensors(model, packed, FLOATS[node.dtype][0]):
        writer.add_tensor(name, stored.data, raw_dtype=gguf.GGMLQuantizationType[stored.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if vocabulary is not None:
        gguf_tokenizer.check(folder / FILE, vocabulary, node.folder)
    for name in TOKENIZER_FILES:
        if (node.folder / name).exists():
            shutil.copyfile(node.folder / name, folder / name)
    return Written(rounded=bool(replaced - packed.keys()), notes=notes)


def write_metadata(writer: GGUFWriter, config: Any, name: str, file_type: int) -> None:
    """What llama.cpp needs to build the model, under the names that it gives to transformers' settings."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name_in_file(name))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def name_in_file(name: str) -> str:
    """A node's name after a word without which transformers would take one named after its architecture for another
    one; the word alone for a name that llama.cpp would read something into."""
    return "coppice" if any(family in name.lower() for family in NAMED_FAMILIES) else f"coppice {name}"


def stored_tensors(model: PreTrainedModel, packed: dict[str, Stored], kind: str) -> Iterator[tuple[str, Stored]]:
    """Every tensor of a dense model under its name in GGUF; vectors in float32, as ggml requires.

    packed: weights that are stored as blocks, by the name of their linear; kind: the type of the others.
    """
    import gguf

    config, family = model.config, architecture_of(model)
    holder = holder_of(config.model_type)
    member = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == holder.name)
    names = gguf.get_tensor_name_map(member, config.num_hidden_layers)
    heads = {}
    if holder.adjacent_rotary:
        for index in range(config.num_hidden_layers):
            heads[family.full_name(index, family.linears["q"])] = config.num_attention_heads
            heads[family.full_name(index, family.linears["k"])] = config.num_key_value_heads
    for full_name, tensor in model.state_dict().items():
        name, _, suffix = full_name.rpartition(".")
        if full_name == family.head_weight and config.tie_word_embeddings:
            continue
        if suffix == "weight" and name in packed:
            stored = packed[name]
        else:
            used = kind if tensor.ndim > 1 else "F32"
            stored = Stored(gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[used]), used)
        if name in heads:
            stored = stored._replace(data=stored.data[neighbours(len(stored.data), heads[name])])
        yield f"{names.get_name(name)}.{suffix}", stored


def neighbours(rows: int, heads: int) -> np.ndarray:
    """[rows] the order of a projection's rows in which those that a rotary embedding turns together are neighbours."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def packed_linears(model: PreTrainedModel) -> dict[str, Stored]:
    """The weights that blocks hold without rounding, by the name of their linear."""
    packed = {}
    for index, block in enumerate(blocks(model)):
        for name, linear in modules.replaceable_modules(block).items():
            if isinstance(linear, modules.QuantizedLinear):
                stored = in_blocks(linear.weight, linear.weight_scale)
                if stored is not None:
                    packed[architecture_of(model).full_name(index, name)] = stored
    return packed


@torch.no_grad()
def in_blocks(weight: Tensor, scale: Tensor) -> Stored | None:
    """A weight [m, n] on a grid with scale [m, groups] as blocks of the smallest type; None where it needs rounding."""
    rows, columns = weight.shape
    size = columns // scale.shape[1]
    if size % BLOCK or not torch.equal(scale.half().float(), scale):
        return None
    levels = torch.round(weight.view(rows, -1, size) / scale[:, :, None]).view(rows, -1, BLOCK)
    low, high = levels.min().item(), levels.max().item()
    factors = scale.half().repeat_interleave(size // BLOCK, dim=1)[:, :, None].contiguous().view(torch.uint8)
    if low >= -8 and high <= 7:
        codes = (levels + 8).to(torch.uint8)
        halves, kind = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4, "Q4_0"
    elif low >= -128 and high <= 127:
        halves, kind = levels.to(torch.int8).view(torch.uint8), "Q8_0"
    else:
        return None
    return Stored(torch.cat((factors, halves), dim=-1).flatten(1).numpy(), kind)


def load(folder: Path) -> PreTrainedModel:
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    fields = GGUFReader(folder / FILE).fields
    # transformers 5.23 passes over this key of qwen2 and qwen3, and takes the size of a head for the usual one.
    config.head_dim = next(field.contents() for key, field in fields.items() if key.endswith(".attention.key_length"))
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, config=config, dtype=torch.float32)
