"""Codes of a few bits packed into int32 words, as compressed-tensors packs them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def zero_words(*shape: int, device: torch.device | str | None) -> Tensor:
    """int32 words of zeros."""
    return torch.zeros(shape, dtype=torch.int32, device=device)


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
