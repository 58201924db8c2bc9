"""What can stand where a linear stood, and how to find it in a decoder.

This file imports torch alone: a checkpoint that stock classes cannot read carries a copy of it (see `checkpoint`).

Shapes: m = out_features, n = in_features, k = rank, b = bits, x: [..., n].
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

# Codebooks are stored as whole multiples of this, so that the type of a checkpoint's numbers does not round them.
TABLE_UNIT = 2.0**-30


class LowRankLinear(nn.Module):
    """y = second(first(x)): first n -> k without bias, second k -> m with the linear's bias."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.first = nn.Linear(in_features, rank, bias=False, **factory)
        self.second = nn.Linear(rank, out_features, bias=bias, **factory)

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class CURLinear(nn.Module):
    """y = columns(link(rows(x))): rows n -> r and columns r -> m hold rows and columns of the weight, link r -> r."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rows = nn.Linear(in_features, rank, bias=False, **factory)
        self.link = nn.Linear(rank, rank, bias=False, **factory)
        self.columns = nn.Linear(rank, out_features, bias=bias, **factory)

    @property
    def bias(self) -> Tensor | None:
        return self.columns.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.columns(self.link(self.rows(x)))


class TensorTrainLinear(nn.Module):
    """A matrix product operator: site k maps (i_k, bond k) to (bond k-1, o_k), from the last site to the first.

    in_shape: i_1 .. i_K with product n; out_shape: o_1 .. o_K with product m; bonds: the K - 1 inner ones.
    sites[k].weight: [bond k-1 o_k, i_k bond k]. Many vectors at once are multiplied by the matrix that the sites stand
    for, where putting it together and using it takes fewer multiplications.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        bonds: Sequence[int],
        bias: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape, self.bonds = tuple(in_shape), tuple(out_shape), tuple(bonds)
        self.in_features, self.out_features = prod(in_shape), prod(out_shape)
        ends = (1, *bonds, 1)
        self.sites = nn.ModuleList(
            nn.Linear(inputs * ends[k + 1], ends[k] * outputs, bias=False, **factory)
            for k, (inputs, outputs) in enumerate(zip(in_shape, out_shape, strict=True))
        )
        self.bias = nn.Parameter(torch.zeros(self.out_features, **factory)) if bias else None

    def product(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m] without the bias, site after site."""
        ends = (1, *self.bonds, 1)
        before, done = x.shape[:-1], 1
        for k in reversed(range(len(self.sites))):
            # [.., i_1 .. i_k-1, (i_k bond), o_k+1 .. o_K], with the middle moved last for the site's product.
            left = prod(self.in_shape[:k])
            x = x.reshape(*before, left, self.in_shape[k] * ends[k + 1], done).transpose(-1, -2)
            x = self.sites[k](x).unflatten(-1, (ends[k], self.out_shape[k])).movedim(-3, -1)
            done *= self.out_shape[k]
        return x.reshape(*before, self.out_features)

    def matrix(self, weights: Sequence[Tensor]) -> Tensor:
        """[m, n]: the weights of the sites, in whatever dtype, contracted with each other."""
        ends = (1, *self.bonds, 1)
        whole = weights[0].new_ones(1, 1, 1)  # [outputs, inputs, bond] so far
        for k, weight in enumerate(weights):
            core = weight.view(ends[k], self.out_shape[k], self.in_shape[k], ends[k + 1])
            whole = torch.einsum("oib,bpjc->opijc", whole, core).flatten(2, 3).flatten(0, 1)
        return whole[:, :, 0]

    def multiplications(self) -> tuple[int, int]:
        """Those of `product` for one vector, and those of `matrix`."""
        ends = (1, *self.bonds, 1)
        product = matrix = 0
        for k in range(len(self.sites)):
            pair = self.in_shape[k] * self.out_shape[k] * ends[k] * ends[k + 1]
            product += prod(self.in_shape[:k]) * prod(self.out_shape[k + 1 :]) * pair
            matrix += prod(self.in_shape[:k]) * prod(self.out_shape[:k]) * pair
        return product, matrix

    def forward(self, x: Tensor) -> Tensor:
        product, matrix = self.multiplications()
        vectors = x.numel() // self.in_features
        # Whoever watches or rounds the inputs of the sites wants them computed.
        watched = any(site._forward_pre_hooks or site._forward_hooks for site in self.sites)
        if not watched and vectors * (product - self.in_features * self.out_features) > matrix:
            return nn.functional.linear(x, self.matrix([site.weight for site in self.sites]), self.bias)
        y = self.product(x)
        return y if self.bias is None else y + self.bias


class LowRankCorrectedLinear(nn.Module):
    """y = base(x) + compensation(x): a compressed linear and a low-rank correction beside it."""

    def __init__(self, base: nn.Module, rank: int, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.compensation = LowRankLinear(self.in_features, self.out_features, rank, **factory)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.compensation(x)


class QuantizedLinear(nn.Linear):
    """A linear whose weight is stored as packed integers, in the pack-quantized form of compressed-tensors.

    w[i, j] = weight_scale[i, g] (code[i, j] - zero_point[i, g]), g = j // group_size (group_size -1: one group a row).
    weight_packed: [m, ceil(n b / 32)] int32, code j of a row at its bits j b .. (j+1) b; weight_scale: [m, groups];
    weight_zero_point (asymmetric only): [ceil(m b / 32), groups] int32, packed down the rows; weight_shape: (m, n).
    Codes are stored from 0; a symmetric grid has its zero at 2^(b-1). The product is computed with the dequantized
    weight: storage is saved, arithmetic is not.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        symmetric: bool,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        groups = 1 if group_size == -1 else in_features // group_size

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.register_buffer("weight_packed", integers(out_features, packed_words(in_features, bits)))
        self.register_buffer("weight_scale", torch.ones((out_features, groups), device=device, dtype=dtype))
        if not symmetric:
            self.register_buffer("weight_zero_point", integers(packed_words(out_features, bits), groups))
        self.register_buffer("weight_shape", torch.tensor((out_features, in_features), device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        group_size: int,
        symmetric: bool,
        bias: Tensor | None,
    ) -> QuantizedLinear:
        """Packs codes [m, n] with scale and zero_point [m, groups] (see `methods.base.Quantized` for their ranges)."""
        out_features, in_features = codes.shape
        module = cls(
            in_features,
            out_features,
            bits,
            group_size,
            symmetric,
            bias is not None,
            device=codes.device,
            dtype=scale.dtype,
        )
        module.weight_packed = pack(codes + 2 ** (bits - 1) if symmetric else codes, bits)
        module.weight_scale = scale
        if not symmetric:
            module.weight_zero_point = pack(zero_point.T, bits).T.contiguous()
        if bias is not None:
            module.bias = nn.Parameter(bias)
        return module

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [m, n], in the dtype of the scale."""
        codes = unpack(self.weight_packed, self.bits, self.in_features)
        groups = self.weight_scale.shape[1]
        if self.symmetric:
            zero = torch.full_like(self.weight_scale, 2 ** (self.bits - 1), dtype=torch.int32)
        else:
            zero = unpack(self.weight_zero_point.T, self.bits, self.out_features).T
        levels = codes.view(self.out_features, groups, -1) - zero[:, :, None]
        return (levels.to(self.weight_scale.dtype) * self.weight_scale[:, :, None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class CodebookLinear(nn.Linear):
    """A linear whose weight is stored as packed indices into a table, with one scale for each block of weights.

    D = W, or W^T when transposed; the columns of D at `weight_outlier_index` [p] are stored whole in `weight_outliers`
    [rows, p]; the others, row after row, are absmax[block] table[code]. weight_packed: [words] int32; weight_table:
    [2^bits] int32 in units of `TABLE_UNIT`; weight_absmax: one for each `block` codes. The product is computed with the
    dequantized weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        block: int,
        outliers: int = 0,
        transposed: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.block, self.outliers, self.transposed = bits, block, outliers, transposed
        rows, columns = (in_features, out_features) if transposed else (out_features, in_features)
        self.coded_shape = (rows, columns - outliers)
        count = prod(self.coded_shape)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.register_buffer("weight_packed", integers(packed_words(count, bits)))
        self.register_buffer("weight_table", integers(2**bits))
        self.register_buffer("weight_absmax", torch.ones(-(-count // block), device=device, dtype=dtype))
        if outliers:
            self.register_buffer("weight_outliers", torch.zeros((rows, outliers), device=device, dtype=dtype))
            self.register_buffer("weight_outlier_index", integers(outliers))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        table: Tensor,
        absmax: Tensor,
        block: int,
        bits: int,
        outliers: Tensor | None,
        outlier_weight: Tensor | None,
        transposed: bool,
        bias: Tensor | None,
    ) -> CodebookLinear:
        """Packs what `methods.base.Codebook` describes; absmax and outlier_weight in the type to compute in."""
        kept = 0 if outliers is None else len(outliers)
        rows, columns = codes.shape[0], codes.shape[1] + kept
        shape = (rows, columns) if transposed else (columns, rows)
        factory = {"device": codes.device, "dtype": absmax.dtype}
        module = cls(*shape, bits, block, kept, transposed, bias is not None, **factory)
        module.weight_packed = pack(codes.reshape(1, -1), bits)[0]
        module.weight_table = torch.round(table.double() / TABLE_UNIT).to(torch.int32).to(codes.device)
        module.weight_absmax = absmax
        if kept:
            module.weight_outliers = outlier_weight
            module.weight_outlier_index = outliers.to(torch.int32)
        if bias is not None:
            module.bias = nn.Parameter(bias)
        return module

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [m, n], in the dtype of the scales, to which each product is rounded once."""
        count = prod(self.coded_shape)
        codes = unpack(self.weight_packed[None], self.bits, count)[0]
        dtype = self.weight_absmax.dtype
        table = (self.weight_table.double() * TABLE_UNIT).to(torch.promote_types(dtype, torch.float32))
        block = torch.arange(count, device=codes.device) // self.block
        values = (table[codes] * self.weight_absmax[block]).to(dtype).view(self.coded_shape)
        if self.outliers:
            rows, columns = self.coded_shape
            whole = values.new_empty(rows, columns + self.outliers)
            index = self.weight_outlier_index.long()
            rest = torch.ones(columns + self.outliers, dtype=torch.bool, device=index.device)
            rest[index] = False
            whole[:, index], whole[:, rest] = self.weight_outliers, values
            values = whole
        return values.T if self.transposed else values

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, block={self.block}"


class FlattenQuantLinear(nn.Linear):
    """Weights and inputs on one symmetric grid each for the whole tensor, their large channels split into pieces.

    y = W' round(x') with x' [n'] of `flatten_inputs`, rounded to threshold / (2^(bits-1) - 1) and held within the
    threshold. weight_packed: [m, words] codes stored from 0, zero at 2^(bits-1); weight_scale, weight_threshold: [1];
    weight_source, weight_piece: [n'] int32 (see `methods.base.Flattened`). Arithmetic is simulated in floats.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        expanded: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.expanded = bits, expanded

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.register_buffer("weight_packed", integers(out_features, packed_words(expanded, bits)))
        self.register_buffer("weight_source", integers(expanded))
        self.register_buffer("weight_piece", integers(expanded))
        self.register_buffer("weight_scale", torch.ones(1, device=device, dtype=dtype))
        self.register_buffer("weight_threshold", torch.ones(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        source: Tensor,
        piece: Tensor,
        threshold: Tensor,
        bits: int,
        in_features: int,
        bias: Tensor | None,
    ) -> FlattenQuantLinear:
        """Packs what `methods.base.Flattened` describes; scale and threshold [1] in the type to compute in."""
        factory = {"device": codes.device, "dtype": scale.dtype}
        module = cls(in_features, len(codes), bits, codes.shape[1], bias is not None, **factory)
        module.weight_packed = pack(codes + 2 ** (bits - 1), bits)
        module.weight_source, module.weight_piece = source.to(torch.int32), piece.to(torch.int32)
        module.weight_scale, module.weight_threshold = scale, threshold
        if bias is not None:
            module.bias = nn.Parameter(bias)
        return module

    @property
    def expanded_weight(self) -> Tensor:
        """W' [m, n'], in the dtype of the scale."""
        codes = unpack(self.weight_packed, self.bits, self.expanded) - 2 ** (self.bits - 1)
        return codes.to(self.weight_scale.dtype) * self.weight_scale

    @property
    def weight(self) -> Tensor:
        """[m, n] what the layer multiplies by where no input saturates."""
        source, expanded = self.weight_source.long(), self.expanded_weight
        # An input's pieces see the same columns; the parts of a split column add up.
        pieces = torch.ones(self.in_features, device=source.device, dtype=source.dtype)
        pieces = pieces.scatter_reduce(0, source, self.weight_piece.long() + 1, "amax")
        shares = expanded / pieces[source].to(expanded.dtype)
        return expanded.new_zeros(self.out_features, self.in_features).index_add(1, source, shares)

    def forward(self, x: Tensor) -> Tensor:
        flat = flatten_inputs(x, self.weight_source.long(), self.weight_piece, self.weight_threshold)
        step = self.weight_threshold / (2 ** (self.bits - 1) - 1)
        rounded = torch.round(torch.clamp(flat, -self.weight_threshold, self.weight_threshold) / step) * step
        return nn.functional.linear(flat + (rounded - flat).detach(), self.expanded_weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, expanded={self.expanded}"


def flatten_inputs(x: Tensor, source: Tensor, piece: Tensor, threshold: Tensor) -> Tensor:
    """[..., n] -> [..., n']: of input source[c] the piece[c]-th stretch of length T; the last one takes the rest.

    The pieces of an input add up to it exactly; piece -1 is the whole input.
    """
    chosen = x[..., source]
    last = torch.zeros(x.shape[-1], device=x.device, dtype=piece.dtype).scatter_reduce(0, source, piece, "amax")[source]
    low = piece.clamp(min=0).to(x.dtype) * threshold
    stretch = (chosen.abs() - low).clamp(min=0)
    stretch = torch.where(piece < last, torch.minimum(stretch, threshold), stretch)
    return torch.sign(chosen) * stretch


def round_tokens(x: Tensor, bits: int, symmetric: bool, clip: float) -> Tensor:
    """x [..., n] rounded token by token to 2^bits levels over `clip` of its range; gradients pass unchanged.

    Symmetric: s = clip max|x| / (2^(bits-1) - 1), levels -2^(bits-1) .. 2^(bits-1) - 1. Asymmetric: the range from the
    least to the largest value, widened to hold 0, with an integer zero point.
    """
    wide = x.detach().float()
    if symmetric:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = clip * wide.abs().amax(dim=-1, keepdim=True) / high
        zero = torch.zeros_like(scale)
    else:
        low, high = 0, 2**bits - 1
        least = clip * wide.amin(dim=-1, keepdim=True).clamp(max=0)
        scale = (clip * wide.amax(dim=-1, keepdim=True).clamp(min=0) - least) / high
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if not symmetric:
        zero = torch.round(-least / scale)
    rounded = scale * ((torch.round(wide / scale) + zero).clamp(low, high) - zero)
    return x + (rounded.to(x.dtype) - x).detach()


def quantize_activations(linear: nn.Linear, settings: dict[str, Any]) -> None:
    """Makes a linear round its inputs token by token from now on: settings of `round_tokens`."""
    linear.rounded_inputs = settings
    linear.register_forward_pre_hook(_quantize_first)


def _quantize_first(linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (round_tokens(inputs[0], **linear.rounded_inputs), *inputs[1:])


def packed_words(count: int, bits: int) -> int:
    """How many int32 words hold `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """[r, c] codes in 0 .. 2^bits - 1 -> [r, ceil(c bits / 32)] int32, without padding bits between codes."""
    rows, columns = codes.shape
    periods = -(-columns // 32)
    # 32 codes fill exactly `bits` words, so positions repeat with that period.
    padded = nn.functional.pad(codes.long(), (0, periods * 32 - columns)).view(rows, periods, 32)
    words = torch.zeros((rows, periods, bits), dtype=torch.int64, device=codes.device)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        words[..., word] |= (padded[..., place] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= padded[..., place] >> (32 - shift)
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.flatten(1)[:, : packed_words(columns, bits)].to(torch.int32).contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: [r, ceil(columns bits / 32)] int32 -> [r, columns] int32."""
    rows = words.shape[0]
    periods = -(-columns // 32)
    padded = nn.functional.pad(words.long() & 0xFFFFFFFF, (0, periods * bits - words.shape[1]))
    padded = padded.view(rows, periods, bits)
    codes = torch.empty((rows, periods, 32), dtype=torch.int32, device=words.device)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        value = padded[..., word] >> shift
        if shift + bits > 32:
            value = value | (padded[..., word + 1] << (32 - shift))
        codes[..., place] = value & (2**bits - 1)
    return codes.flatten(1)[:, :columns]


COMPOSITES = (LowRankLinear, CURLinear, TensorTrainLinear, LowRankCorrectedLinear)
PACKED = (QuantizedLinear, CodebookLinear, FlattenQuantLinear)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks, in order."""
    return model.model.layers


def replaceable_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The linears of a block as its architecture names them: a composite counts once, its parts not."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(child, (nn.Linear, *COMPOSITES)):
            found[name] = child
    return found


def weight_matrices(module: nn.Module) -> dict[str, nn.Linear]:
    """Every matrix of a block: linears, and the factors inside composites."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def effective_weight(module: nn.Module) -> Tensor:
    """[m, n] the matrix that a linear or composite multiplies by.

    A composite's parts are put together in float32 at least: rounding their product would add an error that the layer
    does not make.
    """
    if isinstance(module, LowRankLinear):
        return _wide(module.second) @ _wide(module.first)
    if isinstance(module, CURLinear):
        return _wide(module.columns) @ _wide(module.link) @ _wide(module.rows)
    if isinstance(module, LowRankCorrectedLinear):
        return _wide(module.base) + _wide(module.compensation)
    if isinstance(module, TensorTrainLinear):
        return module.matrix([_wide(site) for site in module.sites])
    return module.weight


def _wide(module: nn.Module) -> Tensor:
    """The effective weight in float32, or in its own type where that is wider."""
    weight = effective_weight(module)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def mask(linear: nn.Linear) -> Tensor | None:
    """[m, n] bool, True where a masked linear's weight is kept; None for a linear that is not masked."""
    return linear.weight != 0 if getattr(linear, "masked", False) else None


def describe(module: nn.Module) -> dict[str, Any]:
    """What `install` needs to know of a module that stands in a linear's place; empty for an ordinary linear."""
    if isinstance(module, QuantizedLinear):
        return {
            "type": "Quantized",
            "bits": module.bits,
            "group_size": module.group_size,
            "symmetric": module.symmetric,
        }
    if isinstance(module, CodebookLinear):
        fields = {"bits": module.bits, "block": module.block, "outliers": module.outliers}
        return {"type": "Coded", **fields, "transposed": module.transposed}
    if isinstance(module, FlattenQuantLinear):
        return {"type": "Flattened", "bits": module.bits, "expanded": module.expanded}
    if isinstance(module, LowRankCorrectedLinear):
        return {"type": "Compensated", "rank": module.compensation.first.out_features}
    if isinstance(module, LowRankLinear):
        return {"type": "LowRank", "rank": module.first.out_features}
    if isinstance(module, CURLinear):
        return {"type": "Skeleton", "rank": module.link.out_features}
    if isinstance(module, TensorTrainLinear):
        shapes = {"in_shape": module.in_shape, "out_shape": module.out_shape, "bonds": module.bonds}
        return {"type": "TensorTrain", **{name: list(shape) for name, shape in shapes.items()}}
    return {"type": "Masked"} if getattr(module, "masked", False) else {}


def describe_replacements(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What stands at each replaced module, by its name: what `install` needs to build it again."""
    described: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        entry = describe(module)
        if hasattr(module, "rounded_inputs"):
            entry = {"type": "Linear", **entry, "rounded_inputs": module.rounded_inputs}
        if entry:
            described[name] = entry
    return described


def install(model: nn.Module, planned: dict[str, dict[str, Any]]) -> None:
    """Puts the planned modules, without values, in the places of a dense model's linears."""
    for name in sorted(planned, key=lambda name: name.count(".")):
        entry, old = dict(planned[name]), model.get_submodule(name)
        kind, rounded = entry.pop("type"), entry.pop("rounded_inputs", None)
        if kind == "Masked":
            old.masked = True
        # A Compensated brings the LowRank beside it along.
        elif kind != "Linear" and not isinstance(old, LowRankLinear):
            model.set_submodule(name, _build(kind, old, entry))
        if rounded is not None:
            quantize_activations(model.get_submodule(name), rounded)


def _build(kind: str, old: nn.Linear, entry: dict[str, Any]) -> nn.Module:
    """The module of that type, without values, for the place of a linear."""
    factory = {"device": old.weight.device, "dtype": old.weight.dtype}
    if kind == "Compensated":
        return LowRankCorrectedLinear(old, **entry, **factory)
    factory["bias"] = old.bias is not None
    if kind == "TensorTrain":
        return TensorTrainLinear(**entry, **factory)
    made = {
        "LowRank": LowRankLinear,
        "Skeleton": CURLinear,
        "Quantized": QuantizedLinear,
        "Coded": CodebookLinear,
        "Flattened": FlattenQuantLinear,
    }
    return made[kind](old.in_features, old.out_features, **entry, **factory)
