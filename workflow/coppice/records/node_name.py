"""The name of a node, which is its path in the tree: `<model>/<step>/<step>@<seed>`."""

from __future__ import annotations

import re


class NodeName(str):
    """A node's name as text, and its parts: `medium/width-50/full@1` was made from `medium/width-50` by `full`.

    A step bears a seed from the first one on that was trained with another seed than the study's.
    """

    __slots__ = ()

    @property
    def model(self) -> str:
        """The dense model at the root of the path."""
        return self.partition("/")[0]

    @property
    def parent(self) -> NodeName | None:
        """The node that it was made from; None for a dense model."""
        return NodeName(self.rpartition("/")[0]) or None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts after the model: steps, with the seed that may follow."""
        return tuple(self.split("/")[1:])

    @property
    def lineage(self) -> tuple[NodeName, ...]:
        """The nodes from the dense model to this one."""
        return (*self.parent.lineage, self) if self.parent else (self,)

    @property
    def last_part(self) -> str:
        """The last part of the path: the step with the seed that may follow, or the dense model."""
        return self.rpartition("/")[2]

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the steps from the dense model to here, without seeds."""
        return tuple(part.partition("@")[0] for part in self.parts)

    @property
    def step(self) -> str | None:
        """The step that made the node; None for a dense model."""
        return self.steps[-1] if self.steps else None

    @property
    def seed(self) -> int | None:
        """The seed in the name; None where the node was made with the study's."""
        _, _, seed = self.rpartition("/")[2].partition("@")
        return int(seed) if seed else None

    @property
    def recipe(self) -> str:
        """The path without the model, seeds included; empty for a dense model."""
        return "/".join(self.parts)

    @property
    def depth(self) -> int:
        """How many steps it is from the dense model."""
        return self.count("/")

    @property
    def with_study_seed(self) -> NodeName:
        """The node that was made by the same steps with the study's seed."""
        return NodeName(re.sub(r"@\d+", "", self))

    def child(self, part: str) -> NodeName:
        """The node that a step, with the seed that may follow, makes from this one."""
        return NodeName(f"{self}/{part}")

    def is_below(self, other: str) -> bool:
        """Whether `other` lies on the path to this node."""
        return self.startswith(f"{other}/")
