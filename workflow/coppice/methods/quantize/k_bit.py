"""k-bit quantization: a table of 2^k values and one scale for each block of weights.

Dettmers and Zettlemoyer, The case for 4-bit precision: k-bit Inference Scaling Laws (arXiv 2212.09720), block-wise
quantization with its data types, and proxy quantization. A weight w of a block of B with a = max|w| becomes
a q[argmin_i |q_i - w / a|]; the tables q are `solvers.codebook`'s, and NF4 is that of Dettmers et al., QLoRA (arXiv
2305.14314). Cost: k + s / B + p (s - k) bits a weight, with s the bits of the type that numbers are stored in and p the
share of outlier inputs; the table of a linear is not counted.

Proxy quantization keeps the weights of some inputs as they are, without looking at activations: an input is taken to be
an outlier where the weights that produce it vary most. The standard deviation is over the row of the previous linear
that writes the input: v_proj for o_proj (the heads repeated as grouped queries do), up_proj for down_proj. For a reader
of the residual stream (q, k, v, gate and up) it is the o_proj or down_proj that added to it last, of the linears that
the options name. The norm between is left out of account. q, k and v of the first block read the embedding, which is no
linear: they have no outliers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Resources, Source
from coppice.methods.incompatible import QUANTIZE
from coppice.methods.options import LayerOptions
from coppice.methods.solvers.codebook import (
    dynamic_table,
    float_table,
    integer_table,
    normal_float_table,
    quantile_table,
    quantize_blocks,
)
from coppice.methods.solvers.selection import share_of
from coppice.models.contracts import Decoder, Linear, LinearStatistics, Role
from coppice.models.replacements import Codebook
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "The case for 4-bit precision: k-bit Inference Scaling Laws",
    "arXiv 2212.09720",
    "block-wise quantization: the nearest q_i to w / absmax, times absmax; proxy quantization",
    "In more than 35,000 runs with 16-bit inputs and k-bit weights, on families of 19M to 176B parameters, 4 bits are "
    "almost universally optimal for total model bits against zero-shot accuracy.",
)

# What writes the input of each linear of a block: the last of these before it in the model's order.
_RESIDUAL: tuple[Role, ...] = ("o", "down")
_WRITERS: dict[Role, tuple[Role, ...]] = {
    "q": _RESIDUAL,
    "k": _RESIDUAL,
    "v": _RESIDUAL,
    "o": ("v",),
    "gate": _RESIDUAL,
    "up": _RESIDUAL,
    "down": ("up",),
}


class Options(LayerOptions):
    bits: int = Field(ge=3, le=8, description="Bits of a code, k.")
    type: Literal["int", "float", "dynamic", "quantile", "normal"] = Field(
        default="float",
        description="The values of the table: symmetric integers, floats, dynamic exponent, quantiles of the weights, "
        "or NF4 (4 bits only).",
    )
    exponent_bits: int | None = Field(
        default=None, ge=1, description="Exponent bits of the type float, fewer than bits; 2 when left out."
    )
    block: int = Field(
        default=64, description="Consecutive weights that share a scale, at least 32; -1: the whole matrix."
    )
    outliers: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Share of the inputs whose weights stay as they are (proxy quantization).",
    )

    @model_validator(mode="after")
    def _table_exists(self) -> Options:
        if self.type == "normal" and self.bits != 4:
            raise ValueError(f"the type normal (NF4) has 4 bits, not {self.bits}; set 'bits: 4' or take another type")
        if self.exponent_bits is not None and self.type != "float":
            raise ValueError(f"'exponent_bits' requires the type float, not {self.type}")
        if self.exponent_bits is not None and self.exponent_bits >= self.bits:
            raise ValueError(
                f"{self.exponent_bits} exponent bits and a sign do not fit in {self.bits} bits; "
                f"take at most {self.bits - 1}"
            )
        if self.block != -1 and self.block < 32:
            raise ValueError(f"a block is at least 32 weights, or -1 for the whole matrix, not {self.block}")
        return self


@dataclass(frozen=True)
class Proxy:
    """inputs: [p] int64 outlier inputs in increasing order, None where nothing predicts them; source: what does."""

    inputs: Tensor | None
    source: str


def plan(decoder: Decoder, options: Options) -> dict[str, Proxy]:
    """The outlier inputs of every linear, from the weights of the linear that writes its input."""
    if options.outliers == 0:
        return {}
    written_by = writers(decoder.names, decoder.paths)
    return {name: _proxy(decoder, name, writer, options.outliers) for name, writer in written_by.items()}


def writers(names: list[str], paths: Mapping[Role, str]) -> dict[str, str | None]:
    """For each linear the linear, earlier in the model's order, that writes its input; None where there is none.

    Inside a composite of linears, each but the first reads the one before it.
    """
    producers: dict[str, str | None] = {}
    last: dict[str, int] = {}
    before: str | None = None
    for index, name in enumerate(names):
        role = _role(name, paths)
        if role is None:
            producers[name] = None
            continue
        block = name.partition(f".{paths[role]}")[0]
        if before is not None and before.startswith(f"{block}.{paths[role]}."):
            producers[name] = before
        else:
            seen = [last[writer] for writer in _WRITERS[role] if writer in last]
            producers[name] = names[max(seen)] if seen else None
        last[role], before = index, name
    return producers


def _role(name: str, paths: Mapping[Role, str]) -> Role | None:
    """The role of a linear, or of the one that it is a factor of."""
    return next((role for role, path in paths.items() if f".{path}." in f"{name}."), None)


def compress(linear: Linear, statistics: LinearStatistics | None, options: Options) -> Codebook:
    """Codes the weights by the nearest entries of the table; zeros stay zeros.

    Raises UserError when the weight is not finite.
    """
    weight = linear.weight
    storage = linear.storage or weight.dtype
    proxy = linear.plan or Proxy(None, "")
    outliers = None if proxy.inputs is None else proxy.inputs.to(weight.device)
    codebook = quantize_blocks(weight, _table(weight, options), options.bits, options.block, outliers, storage)
    return dataclasses.replace(codebook, record=_record(codebook, proxy, options, torch.finfo(storage).bits))


def _proxy(decoder: Decoder, name: str, writer: str | None, share: float) -> Proxy:
    if writer is None:
        return Proxy(None, "No linear before this one writes its input.")
    deviation = decoder.linear(writer).weight.std(dim=1, correction=0)
    inputs = decoder.linear(name).weight.shape[1]
    if len(deviation) < inputs and _role(name, decoder.paths) == "o":
        heads = deviation.view(-1, decoder.head_dim)
        deviation = heads.repeat_interleave(inputs // len(deviation), dim=0).flatten()
    if len(deviation) != inputs:
        return Proxy(None, f"The {len(deviation)} outputs of {writer} are not the {inputs} inputs of this layer.")
    count = share_of(share, inputs)
    if count == 0:
        return Proxy(None, f"A share of {share} of the {inputs} inputs of this layer is none.")
    chosen = torch.sort(deviation, descending=True, stable=True).indices[:count]
    return Proxy(chosen.sort().values, writer)


def _table(weight: Tensor, options: Options) -> Tensor:
    if options.type == "int":
        return integer_table(options.bits)
    if options.type == "float":
        return float_table(options.bits, options.exponent_bits or 2)
    if options.type == "dynamic":
        return dynamic_table(options.bits)
    if options.type == "quantile":
        return quantile_table(options.bits, weight)
    return normal_float_table()


def _record(codebook: Codebook, proxy: Proxy, options: Options, stored_bits: int) -> Json:
    whole = 0 if codebook.outlier_weight is None else codebook.outlier_weight.numel()
    coded = codebook.codes.numel()
    bits = coded * codebook.bits + (len(codebook.absmax) + whole) * stored_bits
    record: Json = {
        "bits": codebook.bits,
        "type": options.type,
        "block": codebook.block,
        "bits_effective": bits / (coded + whole),
    }
    if options.outliers:
        outliers = 0 if codebook.outliers is None else len(codebook.outliers)
        record |= {"outliers_asked": options.outliers, "outliers": outliers, "outliers_from": proxy.source}
    return record


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    adds_traits=frozenset({"quantized"}),
    incompatible_with=QUANTIZE,
    compress=compress,
    plan=plan,
    resources=Resources(reach="model"),
)
