"""What layer methods put in a linear's place, and what it costs by its entry in compression.json.

Each class here that is stored in another form than a linear has a module of its name in `coppice.models.modules`. torch
is not imported: tables and plans count bytes without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from coppice.errors import UserError
from coppice.records.base import JsonMapping
from coppice.records.compression import Entries, Entry

if TYPE_CHECKING:
    from torch import Tensor


class Product(NamedTuple):
    """A product with a stored matrix.

    multiplications: for one vector; stored_bytes: of the weight, scales included; input_bits, output_bits: of a number
    of the states that is read and written; integer: whether integer units can multiply; sparse: whether a kernel for
    2:4 patterns does.
    """

    inputs: int
    outputs: int
    multiplications: int
    stored_bytes: float
    input_bits: float
    output_bits: float
    integer: bool = False
    sparse: bool = False


class Place(NamedTuple):
    """The place of a linear inputs -> outputs, or of a factor within one, and the compression.json that describes it.

    bits: of a stored floating number; sparse: whether masked weights have a 2:4 pattern and a kernel that uses it.
    """

    entries: Entries
    name: str
    inputs: int
    outputs: int
    bits: int
    sparse: bool = False

    @property
    def entry(self) -> Entry:
        return self.entries.get(self.name, {"type": "Linear"})

    def products(self) -> list[Product]:
        """The products with what is stored there."""
        return form_of(self.entry).products(self)

    def part(self, suffix: str, inputs: int, outputs: int) -> list[Product]:
        """The products with a matrix inside the form, which may be packed in its turn."""
        return self._replace(name=f"{self.name}.{suffix}", inputs=inputs, outputs=outputs).products()


# By their type in compression.json. A linear without entry is one that stayed as it was.
_FORMS: dict[str, type[Replacement]] = {}


def form_of(entry: Entry) -> type[Replacement]:
    """The replacement that an entry of compression.json describes. Raises UserError for a type that is not known."""
    kind = entry["type"]
    if kind not in _FORMS:
        raise UserError(
            f"compression.json names the type {kind!r}, which this version of Coppice does not know; use the version, "
            "or install the package of the method, that wrote the checkpoint."
        )
    return _FORMS[kind]


@dataclass(frozen=True)
class Replacement:
    """What a layer method puts in a linear's place, and the record of how (numbers that go into the manifest).

    Of a class: integer_grid: whether weights are on a uniform grid that integer units can multiply, with the grid's
    `bits` among the module's `fields()`. pack_quantized: whether they are stored as compressed-tensors stores such
    grids. factorized: whether the weight is a product of parts. keeps_linear: whether the linear stays, with its weight
    as ordinary numbers.
    """

    integer_grid: ClassVar[bool] = False
    pack_quantized: ClassVar[bool] = False
    factorized: ClassVar[bool] = False
    keeps_linear: ClassVar[bool] = False

    record: JsonMapping = field(default_factory=dict, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _FORMS[cls.__name__] = cls

    @classmethod
    def products(cls, place: Place) -> list[Product]:
        """The products that take the place of the linear's: one with the whole matrix, where a form does not differ."""
        entry, inputs, outputs, bits = place.entry, place.inputs, place.outputs, place.bits
        input_bits = cls.input_bits(entry, bits)
        return [
            Product(
                inputs,
                outputs,
                inputs * outputs,
                cls.stored_bytes(entry, inputs, outputs, bits),
                input_bits,
                bits,
                integer=cls.integer_grid and max(entry["bits"], input_bits) <= 8,
            )
        ]

    @classmethod
    def input_bits(cls, entry: Entry, bits: int) -> int:
        """Of a number that the module multiplies by."""
        return min(bits, entry.get("quantized_activations", {"bits": bits})["bits"])

    @classmethod
    def stored_bytes(cls, entry: Entry, inputs: int, outputs: int, bits: int) -> float:
        """What a weight [outputs, inputs] takes: codes, scales and zero points; bits: of a floating number."""
        return inputs * outputs * bits / 8

    @classmethod
    def decomposition_rank(cls, entry: Entry) -> int | None:
        """The rank of a decomposition that has one for the whole weight."""
        return None


@dataclass(frozen=True)
class Unchanged(Replacement):
    """The linear stays as it is; record["unchanged"] is a sentence with the reason."""

    keeps_linear = True


_FORMS["Linear"] = Unchanged
# A norm across heads, of another width than config.json says.
_FORMS["Norm"] = Unchanged


@dataclass(frozen=True)
class Masked(Replacement):
    """weight: [m, n] with exact zeros where mask ([m, n] bool, True = kept) is False."""

    keeps_linear = True

    weight: Tensor
    mask: Tensor

    @classmethod
    def products(cls, place: Place) -> list[Product]:
        """With a kernel for 2:4 patterns, half the weights and 2 bits for the place of each kept one are stored."""
        (product,) = super().products(place)
        if not place.sparse:
            return [product]
        stored = place.inputs * place.outputs * (place.bits / 2 + 1) / 8
        return [product._replace(stored_bytes=stored, sparse=True)]


@dataclass(frozen=True)
class Codebook(Replacement):
    """w = absmax[block] table[code], over the weights of the inputs that are not outliers, row after row in blocks.

    codes: [m, n - p] int32 in 0 .. 2^bits - 1. table: [2^bits] values in [-1, 1]. absmax: one for each `block`
    consecutive codes of the flattened matrix (the last block may be shorter). outliers: [p] int64 inputs, in increasing
    order, whose columns `outlier_weight` [m, p] are stored as they are. transposed: what is described is W^T.
    """

    codes: Tensor
    table: Tensor
    absmax: Tensor
    block: int
    bits: int
    outliers: Tensor | None = None
    outlier_weight: Tensor | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight."""
        rows, columns = self.codes.shape
        columns += 0 if self.outliers is None else len(self.outliers)
        return (columns, rows) if self.transposed else (rows, columns)

    @classmethod
    def stored_bytes(cls, entry: Entry, inputs: int, outputs: int, bits: int) -> float:
        rows, columns = (inputs, outputs) if entry["transposed"] else (outputs, inputs)
        kept, number = entry["outliers"], bits / 8
        codes = rows * (columns - kept)
        table, scales = 4 * 2 ** entry["bits"], ceil(codes / entry["block"]) * number
        return word_bytes(codes, entry["bits"]) + table + scales + kept * (rows * number + 4)


@dataclass(frozen=True)
class LowRank(Replacement):
    """y = second (first x): first [k, n], second [m, k]. The bias stays on the output."""

    factorized = True

    first: Tensor | Codebook
    second: Tensor | Codebook

    @classmethod
    def products(cls, place: Place) -> list[Product]:
        rank = place.entry["rank"]
        return [*place.part("first", place.inputs, rank), *place.part("second", rank, place.outputs)]

    @classmethod
    def decomposition_rank(cls, entry: Entry) -> int:
        return entry["rank"]


@dataclass(frozen=True)
class CUR(Replacement):
    """y = columns (link (rows x)): rows [r, n] and columns [m, r] of the weight, link [r, r]."""

    factorized = True

    rows: Tensor
    link: Tensor
    columns: Tensor

    @classmethod
    def products(cls, place: Place) -> list[Product]:
        rank = place.entry["rank"]
        sizes = {"rows": (place.inputs, rank), "link": (rank, rank), "columns": (rank, place.outputs)}
        return [product for name, shape in sizes.items() for product in place.part(name, *shape)]

    @classmethod
    def decomposition_rank(cls, entry: Entry) -> int:
        return entry["rank"]


@dataclass(frozen=True)
class TensorTrain(Replacement):
    """A matrix product operator of K sites: cores[k] is [bond k-1, o_k, i_k, bond k], the outer bonds are 1.

    w[(o_1 .. o_K), (i_1 .. i_K)] = cores[0][0, o_1, i_1, :] cores[1][:, o_2, i_2, :] .. cores[K-1][:, o_K, i_K, 0].
    """

    factorized = True

    cores: tuple[Tensor, ...]

    @classmethod
    def products(cls, place: Place) -> list[Product]:
        """One product: with site after site, or with the matrix that they represent where that is less."""
        entry, ends = place.entry, (1, *place.entry["bonds"], 1)
        product, stored = 0, 0.0
        for k, (i, o) in enumerate(zip(entry["in_shape"], entry["out_shape"], strict=True)):
            vectors = prod(entry["in_shape"][:k]) * prod(entry["out_shape"][k + 1 :])
            for site in place.part(f"sites.{k}", i * ends[k + 1], ends[k] * o):
                stored += site.stored_bytes
                product += vectors * site.multiplications
        least = min(product, place.inputs * place.outputs)
        return [Product(place.inputs, place.outputs, least, stored, place.bits, place.bits)]


@dataclass(frozen=True)
class Quantized(Replacement):
    """w[i, j] = scale[i, g] * (codes[i, j] - zero_point[i, g]) with g = group_index[j].

    codes: [m, n] int32; symmetric: -2^(bits-1) .. 2^(bits-1)-1 with zero_point 0; asymmetric: 0 .. 2^bits-1.
    scale, zero_point: [m, groups] (zero_point int32); group_index: [n] int32, j // group_size unless activation order
    with dynamic groups permuted it.
    """

    integer_grid = True
    pack_quantized = True

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_index: Tensor
    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def stored_bytes(cls, entry: Entry, inputs: int, outputs: int, bits: int) -> float:
        groups = 1 if entry["group_size"] == -1 else inputs // entry["group_size"]
        zeros = 0 if entry["symmetric"] else word_bytes(outputs, entry["bits"]) * groups
        return outputs * (word_bytes(inputs, entry["bits"]) + groups * bits / 8) + zeros


@dataclass(frozen=True)
class FlattenQuant(Replacement):
    """Weights and inputs on one symmetric grid each for the whole tensor, their large channels split into pieces.

    Expanded column c comes from input source[c] (int64 [n']), of which it sees piece piece[c] = 0, 1, ..:
    clip(|x| - piece T, 0, T) with the sign of x, the last piece of an input without its upper bound; piece -1 sees x
    whole. w[i, j] = scale * sum of codes[i, c] over the columns of a piece. codes: [m, n'] int32 in -(2^(bits-1) - 1)
    .. 2^(bits-1) - 1; scale: [1]; threshold T. Inputs are rounded to T / (2^(bits-1) - 1) and saturate at T.
    """

    integer_grid = True

    codes: Tensor
    scale: Tensor
    source: Tensor
    piece: Tensor
    threshold: float
    bits: int

    @classmethod
    def products(cls, place: Place) -> list[Product]:
        return super().products(place._replace(inputs=place.entry["expanded"]))

    @classmethod
    def input_bits(cls, entry: Entry, bits: int) -> int:
        return entry["bits"]

    @classmethod
    def stored_bytes(cls, entry: Entry, inputs: int, outputs: int, bits: int) -> float:
        return outputs * word_bytes(inputs, entry["bits"]) + 8 * inputs + 2 * bits / 8


@dataclass(frozen=True)
class QuantizedActivations(Replacement):
    """The linear stays; its inputs are rounded token by token to `bits` (`activation_quantization.round_tokens`)."""

    keeps_linear = True

    bits: int
    symmetric: bool
    clip: float


@dataclass(frozen=True)
class LowRankCorrection(Replacement):
    """Added to what the layer computes: y += second (first x): first [r, n], second [m, r]."""

    first: Tensor
    second: Tensor

    @classmethod
    def products(cls, place: Place) -> list[Product]:
        parts = (place.part(name, place.inputs, place.outputs) for name in ("base", "compensation"))
        return [product for part in parts for product in part]


def word_bytes(count: int, bits: int) -> int:
    """Bytes of the int32 words that hold `count` codes."""
    return 4 * ceil(count * bits / 32)
