"""Ranks of several linears that share one target.

Of linears [m, n] with sum m n parameters, ranks k may together cost floor(keep sum m n). A rank costs m + n, what its
row of the first factor and its column of the second hold, and a linear whose rank reaches break-even stays dense and
costs m n. Remapped (see `decompose.dobi_svd`) a rank costs max(m, n), in numbers of 16 bits, up to min(m, n).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coppice.methods.solvers.selection import share_of
from coppice.methods.solvers.truncation import align_rank, break_even
from coppice.models.contracts import Decoder


@dataclass(frozen=True)
class PlannedRank:
    """The rank planned for one linear, and what the plan adds to its record."""

    rank: int
    record: dict[str, float]


@dataclass(frozen=True)
class RankTarget:
    """shapes: (m, n) of each linear by name. align: ranks are multiples of this, where they reach one multiple."""

    shapes: Mapping[str, tuple[int, int]]
    keep: float
    align: int = 1
    remapped: bool = False

    @classmethod
    def of(cls, decoder: Decoder, keep: float | None, align: int, remapped: bool = False) -> RankTarget:
        """The target of the decoder's linears. keep: as the options have it, which give it where ranks are planned."""
        assert keep is not None
        shapes = {}
        for name in decoder.names:
            rows, columns = decoder.linear(name).weight.shape
            shapes[name] = rows, columns
        return cls(shapes, keep, align, remapped)

    @property
    def capacity(self) -> int:
        return share_of(self.keep, self._all)

    @property
    def _all(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes.values())

    def quantum(self, name: str) -> int:
        """What one rank costs."""
        return max(self.shapes[name]) if self.remapped else sum(self.shapes[name])

    def largest(self, name: str) -> int:
        """The rank from which the linear costs as much as it did before."""
        return min(self.shapes[name]) if self.remapped else break_even(*self.shapes[name])

    def cost(self, name: str, rank: int) -> int:
        rows, columns = self.shapes[name]
        return rows * columns if rank >= self.largest(name) else rank * self.quantum(name)

    def total(self, ranks: Mapping[str, int]) -> int:
        return sum(self.cost(name, rank) for name, rank in ranks.items())

    def fill(self, ranks: Mapping[str, int], order: Sequence[str]) -> dict[str, int]:
        """The ranks, raised in turns by one multiple of align, in this order, until no raise is affordable."""
        filled = dict(ranks)
        spare = self.capacity - self.total(filled)
        raised = True
        while raised:
            raised = False
            for name in order:
                if filled[name] >= self.largest(name):
                    continue
                higher = min(align_rank(filled[name] + self.align, self.align), self.largest(name))
                price = self.cost(name, higher) - self.cost(name, filled[name])
                if price <= spare:
                    filled[name], spare, raised = higher, spare - price, True
        return filled

    def in_proportion(self, sizes: Mapping[str, float]) -> dict[str, int]:
        """Ranks in proportion to the sizes (> 0), as large as the target affords, and at least 1."""

        def ranks(factor: float) -> dict[str, int]:
            scaled = {}
            for name, size in sizes.items():
                largest = self.largest(name)
                rank = int(factor * size)
                scaled[name] = largest if rank >= largest else align_rank(rank, self.align)
            return scaled

        affordable, too_much = 0.0, 1 + max(self.largest(name) / size for name, size in sizes.items())
        # The ends come together to the last digit.
        while affordable < (middle := (affordable + too_much) / 2) < too_much:
            if self.total(ranks(middle)) <= self.capacity:
                affordable = middle
            else:
                too_much = middle
        rounded = ranks(affordable)
        missing = {name: affordable * size - rounded[name] for name, size in sizes.items()}
        return self.fill(rounded, sorted(sizes, key=lambda name: -missing[name]))

    def plans(self, ranks: Mapping[str, int]) -> dict[str, PlannedRank]:
        """The ranks, with what was requested over all linears and what was achieved."""
        what = "bytes" if self.remapped else "parameters"
        record = {f"planned_{what}_asked": self.keep, f"planned_{what}": self.total(ranks) / self._all}
        return {name: PlannedRank(rank, record) for name, rank in ranks.items()}
