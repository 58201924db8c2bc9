"""Keys and values kept compressed while a decoder generates.

Sources: Liu et al., KIVI (arXiv 2402.02750), for keys on grids per channel and values on grids per token; Kang et al.,
GEAR (arXiv 2403.05527), for the low-rank and the sparse part.

States of one layer are [B, H, L, d]: sequences, key/value heads (before they are repeated for the query heads), tokens,
channels. They are cut into vectors: keys into one for each channel, over the tokens of a chunk; values into one for
each token, over the H d channels. Of each vector

1. the share `outliers` (half of it the largest, half the smallest values) is stored as it is, and replaced by the mean
   of the others, which widens no grid;
2. each `group_size` consecutive values (-1: the vector; the last group may be shorter) go to a grid of 2^b levels from
   their minimum to their maximum: scale = (max - min) / (2^b - 1), |x - x^| <= scale / 2;
3. what is then missing, E = X - X^ with the outliers put back, is made up for head by head: E ~ Q P^T of rank r by
   power iteration, Q [L, r] with orthonormal columns, P = E^T Q [d, r].

The prompt is one chunk, up to the last multiple of `window` tokens, with `rank`; after it each `window` tokens are one,
with `decode_rank`. Tokens that do not fill a window stay in full precision. Attention sees what can be read back, of
the newest tokens too, so one call over a whole text measures the compression. Padding counts as tokens.

A checkpoint carries a copy of this file, which imports torch, transformers' cache classes and a file next to it alone.
"""

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .packing import pack, unpack


class CacheSettings(NamedTuple):
    """How keys and values are kept (see above). loops: power iterations."""

    bits: int
    group_size: int = 64
    window: int = 64
    rank: int = 0
    decode_rank: int = 0
    outliers: float = 0.0
    loops: int = 3


class CompressedStates(NamedTuple):
    """Keys or values of a chunk, N vectors of n values with c outliers each. Everything but the words and the indices
    is in the states' own type.

    words: the packed codes; scale, minimum: [N, groups]; outliers, index: [N, c]; tokens: Q [B, H, L, r] and channels:
    P [B, H, d, r]. by_channel: whether they are keys.
    """

    shape: tuple[int, int, int, int]
    by_channel: bool
    bits: int
    group: int
    words: Tensor
    scale: Tensor
    minimum: Tensor
    outliers: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # as transformers' own layers begin  # hides tuple.index
    tokens: Tensor | None = None
    channels: Tensor | None = None

    @property
    def stored_bytes(self) -> int:
        return sum(part.nbytes for part in self if isinstance(part, Tensor))


def compress_states(states: Tensor, by_channel: bool, settings: CacheSettings, rank: int) -> CompressedStates:
    """States [B, H, L, d] of a chunk, compressed; computed in float32, or in their own type where that is wider."""
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    vectors = _vectors_of(exact, by_channel)
    count, length = vectors.shape
    group = _group_of(settings, length)
    outliers = index = None
    if kept := outlier_count(settings, length):
        order = vectors.argsort(dim=1, stable=True)
        chosen = torch.cat([order[:, : (kept + 1) // 2], order[:, length - kept // 2 :]], dim=1)
        outliers, index = vectors.gather(1, chosen).to(states.dtype), chosen.to(_index_type(length))
        # Rounded to the stored type, so that a minimum is stored exactly.
        mean = vectors.scatter(1, chosen, 0).sum(1, keepdim=True) / max(length - kept, 1)
        vectors = vectors.scatter(1, chosen, mean.to(states.dtype).to(exact).expand(-1, kept))
    groups = _split_into_groups(vectors, group)
    minimum, maximum = groups.amin(2), groups.amax(2)
    span = maximum - minimum
    scale = torch.where(span == 0, torch.ones_like(span), span / (2**settings.bits - 1))
    # A range below the smallest stored number would round to a scale of zero.
    scale = scale.to(states.dtype).clamp(min=torch.finfo(states.dtype).tiny)
    levels = torch.round((groups - minimum[:, :, None]) / scale.to(exact)[:, :, None]).clamp(0, 2**settings.bits - 1)
    codes = levels.flatten(1)[:, :length].to(torch.int32)
    stored = CompressedStates(
        tuple(states.shape),  # type: ignore[arg-type]  # of four dimensions
        by_channel,
        settings.bits,
        group,
        pack(codes.reshape(1, count * length), settings.bits),
        scale,
        minimum.to(states.dtype),
        outliers,
        index,
    )
    if rank == 0:
        return stored
    tokens, channels = power_iteration(exact - decompress_states(stored, exact.dtype), rank, settings.loops)
    return stored._replace(tokens=tokens.to(states.dtype), channels=channels.to(states.dtype))


def decompress_states(stored: CompressedStates, dtype: torch.dtype | None = None) -> Tensor:
    """States [B, H, L, d] in their own type, or in `dtype`."""
    own = stored.scale.dtype
    work = torch.promote_types(own, torch.float32)
    batch, heads, tokens, width = stored.shape
    length = tokens if stored.by_channel else heads * width
    count = batch * heads * tokens * width // length
    codes = unpack(stored.words, stored.bits, count * length).view(count, length)
    levels = _split_into_groups(codes, stored.group).to(work)
    groups = levels * stored.scale.to(work)[:, :, None] + stored.minimum.to(work)[:, :, None]
    vectors = groups.flatten(1)[:, :length]
    if stored.outliers is not None and stored.index is not None:
        vectors = vectors.scatter(1, stored.index.long(), stored.outliers.to(work))
    if stored.by_channel:
        states = vectors.view(batch, heads, width, tokens).transpose(2, 3)
    else:
        states = vectors.view(batch, tokens, heads, width).transpose(1, 2)
    if stored.tokens is not None and stored.channels is not None:
        states = states + stored.tokens.to(work) @ stored.channels.to(work).mT
    return states.to(dtype or own)


def power_iteration(matrix: Tensor, rank: int, loops: int) -> tuple[Tensor, Tensor]:
    """Q [.., L, r] and P [.., d, r] with E ~ Q P^T = Q Q^T E for E [.., L, d]; r = min(rank, L, d).

    The start is the same in every call, and that of a smaller rank is the beginning of that of a larger: the error does
    not grow with the rank. Bases are made orthonormal in every loop, which changes no span and keeps small E from
    vanishing.
    """
    length, width = matrix.shape[-2:]
    rank = min(rank, length, width)
    start = torch.rand(rank, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).T
    channels = start.to(matrix).expand(*matrix.shape[:-2], width, rank)
    for _ in range(loops):
        tokens = torch.linalg.qr(matrix @ torch.linalg.qr(channels).Q).Q
        channels = matrix.mT @ tokens
    return tokens, channels


def outlier_count(settings: CacheSettings, length: int) -> int:
    """Values of a vector stored as they are: 2 ceil(s n / 2), as many large as small ones, at most all n."""
    return min(2 * ceil(round(settings.outliers * length / 2, 6)), length)


def cache_bytes(
    settings: CacheSettings, batch: int, heads: int, width: int, prompt: int, decoded: int, element_size: int
) -> int:
    """What one layer's cache holds after a prompt of so many tokens and so many decoded ones; see `_chunk_bytes`."""
    whole = prompt // settings.window * settings.window
    chunks = [(whole, settings.rank)] if whole else []
    newer = prompt - whole + decoded
    chunks += [(settings.window, settings.decode_rank)] * (newer // settings.window)
    newest = 2 * batch * heads * width * (newer % settings.window) * element_size
    return newest + sum(
        _chunk_bytes(settings, (batch, heads, tokens, width), by_channel, rank, element_size)
        for tokens, rank in chunks
        for by_channel in (True, False)
    )


def _chunk_bytes(
    settings: CacheSettings, shape: tuple[int, int, int, int], by_channel: bool, rank: int, element_size: int
) -> int:
    """N vectors of n values in a type of e bytes take 4 ceil(N n b / 32) for codes, 2 N ceil(n / g) e for grids,
    N c (e + 2) for outliers (e + 4 beyond 32768 values) and B H r (L + d) e for factors.
    """
    batch, heads, tokens, width = shape
    length = tokens if by_channel else heads * width
    count = batch * heads * tokens * width // length
    codes = 4 * ceil(count * length * settings.bits / 32)
    grids = 2 * count * ceil(length / _group_of(settings, length)) * element_size
    sparse = count * outlier_count(settings, length) * (element_size + _index_type(length).itemsize)
    factors = batch * heads * min(rank, tokens, width) * (tokens + width) * element_size
    return codes + grids + sparse + factors


def _group_of(settings: CacheSettings, length: int) -> int:
    return length if settings.group_size == -1 else min(settings.group_size, length)


def _index_type(length: int) -> torch.dtype:
    return torch.int16 if length <= 2**15 else torch.int32


def _vectors_of(states: Tensor, by_channel: bool) -> Tensor:
    """[N, n]: [B H d, L] by channel, [B L, H d] by token."""
    return states.transpose(2, 3).flatten(0, 2) if by_channel else states.transpose(1, 2).flatten(2).flatten(0, 1)


def _split_into_groups(vectors: Tensor, group: int) -> Tensor:
    """[N, n] -> [N, groups, group], the last value repeated to fill the last group: its range stays what it is."""
    missing = -vectors.shape[1] % group
    padded = torch.cat([vectors, vectors[:, -1:].expand(-1, missing)], dim=1)
    return padded.unflatten(1, (-1, group))


class CompressedCacheLayer(CacheLayerMixin):
    """The cache of one layer: compressed chunks, and the newest tokens in full precision (`keys` and `values`)."""

    def __init__(self, settings: CacheSettings) -> None:
        super().__init__()
        self.settings = settings
        self.chunks: list[tuple[CompressedStates, CompressedStates]] = []
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes in new keys and values; returns all of them as they can be read back, in [B, H, tokens, d].

        Gradients reach the new ones as if they had not been rounded.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states.detach(), value_states.detach())
        keys = torch.cat([self.keys, key_states.detach()], dim=2)
        values = torch.cat([self.values, value_states.detach()], dim=2)
        window, prompt = self.settings.window, self.length == 0
        whole = keys.shape[2] // window * window
        # Copies, so that what is compressed does not stay in memory as part of a view's storage.
        self.keys, self.values = keys[:, :, whole:].clone(), values[:, :, whole:].clone()
        self.length += key_states.shape[2]
        if whole:
            width, rank = (whole, self.settings.rank) if prompt else (window, self.settings.decode_rank)
            self.chunks += [
                (
                    compress_states(keys[:, :, start : start + width], True, self.settings, rank),
                    compress_states(values[:, :, start : start + width], False, self.settings, rank),
                )
                for start in range(0, whole, width)
            ]
        held_keys = torch.cat([*(decompress_states(key) for key, _ in self.chunks), self.keys], dim=2)
        held_values = torch.cat([*(decompress_states(value) for _, value in self.chunks), self.values], dim=2)
        return _straight_through(held_keys, key_states), _straight_through(held_values, value_states)

    @property
    def stored_bytes(self) -> int:
        """Bytes of every tensor that the layer holds."""
        if not self.is_initialized:
            return 0
        return self.keys.nbytes + self.values.nbytes + sum(part.stored_bytes for chunk in self.chunks for part in chunk)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment]  # as transformers' own layers begin
        self.chunks, self.length, self.is_initialized = [], 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError(_ONE_WAY.format("reordered for beam search: use sampling or greedy search"))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(_ONE_WAY.format("shortened: generate without an assistant model"))

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError(_ONE_WAY.format("repeated: repeat the prompt instead"))

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError(_ONE_WAY.format("selected from: generate for every sequence of the batch"))

    def offload(self) -> None:
        raise NotImplementedError(_ONE_WAY.format("moved to the processor: generate without offloading"))


_ONE_WAY = "Keys and values that are kept compressed cannot be {}."


def _straight_through(held: Tensor, new: Tensor) -> Tensor:
    """held [B, H, tokens, d], the gradient of whose last tokens goes to `new` [B, H, L, d] unchanged."""
    if not new.requires_grad:
        return held
    past, newest = held.split([held.shape[2] - new.shape[2], new.shape[2]], dim=2)
    return torch.cat([past, newest + (new - new.detach())], dim=2)


class CompressedCache(Cache):
    """A cache whose layers are kept by the settings (fields of `CacheSettings`)."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(layer_class_to_replicate=partial(CompressedCacheLayer, CacheSettings(**settings)))

    @property
    def stored_bytes(self) -> int:
        return sum(layer.stored_bytes for layer in self.layers)


def install_cache(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Makes the model's decoder keep its keys and values by the settings (fields of `CacheSettings`).

    They are left on the decoder as `cache_settings`; installing again replaces them.
    """
    decoder: Any = model.model
    CacheSettings(**settings)
    if not hasattr(decoder, "cache_settings"):
        decoder.register_forward_pre_hook(_give_compressed_cache, with_kwargs=True)
    decoder.cache_settings = dict(settings)


def _give_compressed_cache(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call without a cache, or with the empty one that generate() makes, gets a compressed one."""
    past = kwargs.get("past_key_values")
    if isinstance(past, CompressedCache):
        return args, kwargs
    if past is None or (type(past) is DynamicCache and past.get_seq_length() == 0):
        return args, kwargs | {"past_key_values": CompressedCache(decoder.cache_settings)}
    raise ValueError(
        f"This model keeps its keys and values compressed, and a {type(past).__name__} was passed: pass no "
        "past_key_values, or those that an earlier call returned."
    )
