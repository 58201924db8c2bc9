"""What can stand where a linear stood, and how to find it in a decoder.

This file imports torch alone: a checkpoint that stock classes cannot read carries a copy of it (see `checkpoint`).

Shapes: m = out_features, n = in_features, k = rank, b = bits, x: [..., n].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
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


class Compensated(nn.Module):
    """y = base(x) + compensation(x): a compressed linear and a low-rank correction beside it."""

    def __init__(self, base: nn.Module, rank: int, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.compensation = LowRank(self.in_features, self.out_features, rank, **factory)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.compensation(x)


class Quantized(nn.Linear):
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
    ) -> Quantized:
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


COMPOSITES = (LowRank, Compensated)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks, in order."""
    return model.model.layers


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """The linears of a block as its architecture names them: a composite counts once, its parts not."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(child, (nn.Linear, *COMPOSITES)):
            found[name] = child
    return found


def leaves(module: nn.Module) -> dict[str, nn.Linear]:
    """Every matrix of a block: linears, and the factors inside composites."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def effective_weight(module: nn.Module) -> Tensor:
    """[m, n] the matrix that a linear or composite multiplies by."""
    if isinstance(module, LowRank):
        return effective_weight(module.second) @ effective_weight(module.first)
    if isinstance(module, Compensated):
        return effective_weight(module.base) + effective_weight(module.compensation)
    return module.weight


def mask(linear: nn.Linear) -> Tensor | None:
    """[m, n] bool, True where a masked linear's weight is kept; None for a linear that is not masked."""
    return linear.weight != 0 if getattr(linear, "masked", False) else None


def plan(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What stands at each replaced module, by its name: what `install` needs to build it again."""
    described: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            fields = {"bits": module.bits, "group_size": module.group_size, "symmetric": module.symmetric}
            described[name] = {"type": "Quantized", **fields}
        elif isinstance(module, Compensated):
            described[name] = {"type": "Compensated", "rank": module.compensation.first.out_features}
        elif isinstance(module, LowRank):
            described[name] = {"type": "LowRank", "rank": module.first.out_features}
        elif getattr(module, "masked", False):
            described[name] = {"type": "Masked"}
    return described


def install(model: nn.Module, planned: dict[str, dict[str, Any]]) -> None:
    """Puts the planned modules, without values, in the places of a dense model's linears."""
    for name in sorted(planned, key=lambda name: name.count(".")):
        entry, old = planned[name], model.get_submodule(name)
        if entry["type"] == "Masked":
            old.masked = True
            continue
        if isinstance(old, LowRank):  # the compensation that its Compensated brought along
            continue
        factory = {"device": old.weight.device, "dtype": old.weight.dtype}
        shape, bias = (old.in_features, old.out_features), old.bias is not None
        if entry["type"] == "Compensated":
            new: nn.Module = Compensated(old, entry["rank"], **factory)
        elif entry["type"] == "LowRank":
            new = LowRank(*shape, entry["rank"], bias, **factory)
        else:
            new = Quantized(*shape, entry["bits"], entry["group_size"], entry["symmetric"], bias, **factory)
        model.set_submodule(name, new)
