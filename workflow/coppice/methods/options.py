"""Options that methods share: of layers, of budgets and their allocation, of recovery training."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class MethodOptions(BaseModel):
    """Options that a method's own class extends; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def needs(self) -> frozenset[str]:
        """What these options read in addition to the method's `needs`."""
        return frozenset()


class LayerOptions(MethodOptions):
    """Options that every layer method has."""

    target_modules: list[str] | None = Field(
        default=None,
        description="Only the linears with one of these names, as in [q_proj, k_proj]; the others stay as they are. "
        "All of them when left out.",
    )

    sequential: bool = Field(
        default=False,
        description="Gather calibration statistics block by block, after the blocks already compressed, instead of "
        "reading the parent's.",
    )

    @field_validator("target_modules")
    @classmethod
    def _names_some(cls, target_modules: list[str] | None) -> list[str] | None:
        if target_modules is not None and not target_modules:
            raise ValueError(
                "the list is empty, so nothing would be compressed: name linears, or leave it out for all of them"
            )
        return target_modules


class Allocation(BaseModel):
    """How a target is allocated across linears; over all of them it stays what is requested (see `allocate`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["uniform", "sensitivity", "owl", "mosaic", "svd-llm-v2", "water-filling", "knapsack"] = Field(
        default="uniform",
        description="The rule. uniform: every linear gets the same; sensitivity: more where the relative error of the "
        "outputs at the uniform target is larger; owl, mosaic: more where weights times inputs have more outliers, by "
        "block or by projection; svd-llm-v2: less is removed where truncation loses more, within each kind of linear; "
        "water-filling: the largest singular values of all linears; knapsack: the least summed loss over `levels`.",
    )
    floor: float = Field(
        default=0.5, ge=0, le=1, description="Least share of the uniform target that any linear gets; 1 is uniform."
    )
    spread: float = Field(
        default=0.08, ge=0, le=0.5, description="owl, mosaic: half the distance of the largest and smallest share."
    )
    outlier_factor: float = Field(
        default=5.0, gt=0, description="owl, mosaic: an outlier is more than this many times the mean."
    )
    levels: list[float] | None = Field(
        default=None,
        description="knapsack: the targets to choose from, as the method's own option takes them; when left out, for "
        "bits the integers from 2 to 8, otherwise 17 around the requested one, down to the floor.",
    )
    relative: bool = Field(
        default=False,
        description="water-filling, knapsack: count a linear's loss relative to the power of its outputs.",
    )

    @model_validator(mode="after")
    def _levels_to_choose_from(self) -> Allocation:
        if self.levels is None:
            return self
        if self.by != "knapsack":
            raise ValueError(f"'levels' are what a knapsack chooses from, and {self.by!r} does not: leave them out")
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"the levels {self.levels} are not one or more different targets")
        return self

    @model_validator(mode="after")
    def _relative_losses(self) -> Allocation:
        if self.relative and self.by not in ("water-filling", "knapsack"):
            raise ValueError(f"'relative' requires water-filling or knapsack, not {self.by!r}: leave it out")
        return self


class TargetOptions(LayerOptions):
    """Options of a method with a target: a share of weights to prune or to keep, a rank, or bits."""

    # The field that holds the target ("sparsity", "keep", "bits" or "rank"), and the rules that can spread it.
    TARGET: ClassVar[str]
    RULES: ClassVar[frozenset[str]] = frozenset({"uniform"})

    allocation: Allocation = Field(default=Allocation(), description="How the target is allocated across linears.")

    @model_validator(mode="after")
    def _a_rule_for_this_target(self) -> TargetOptions:
        if self.allocation.by not in self.RULES:
            raise ValueError(
                f"the allocation {self.allocation.by!r} does not go with this method: choose one of "
                f"{', '.join(sorted(self.RULES))}"
            )
        return self

    @model_validator(mode="after")
    def _levels_of_this_target(self) -> TargetOptions:
        for level in self.allocation.levels or ():
            wrong = _LEVELS[self.TARGET](level)
            if wrong:
                raise ValueError(f"the level {level:g} of the allocation is not a target of this method: {wrong}")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | (frozenset() if self.allocation.by == "uniform" else frozenset({"moments"}))


# What is wrong with a level of each target, or None.
_LEVELS: dict[str, Callable[[float], str | None]] = {
    "sparsity": lambda level: None if 0 <= level < 1 else "a sparsity is at least 0 and less than 1",
    "keep": lambda level: None if 0 < level <= 1 else "a share to keep is more than 0 and at most 1",
    "bits": lambda level: None if level in range(2, 9) else "bits are an integer from 2 to 8",
    "rank": lambda level: "a rank is spread by water-filling, which has no levels",
}


class CacheOptions(MethodOptions):
    """Options of the grids on which keys and values are kept: keys along tokens, values along channels."""

    bits: int = Field(ge=2, le=8, description="Bits of a code.")
    group_size: int = Field(
        default=64,
        description="Consecutive tokens of a key's channel, or channels of a value's token (all heads' in a row), that "
        "share a scale and a minimum; a group ends where a chunk ends. -1: all of them.",
    )

    @field_validator("group_size")
    @classmethod
    def _is_size(cls, group_size: int) -> int:
        if group_size < 1 and group_size != -1:
            raise ValueError(f"a group size is a positive number of values, or -1 for all of them, not {group_size}")
        return group_size


class RecoverOptions(MethodOptions):
    """Options of every training method of the family recover. Training is counted in tokens, not in steps."""

    text: str = Field(description="Name of the text to train on; its documents of the role recovery are read.")
    validation: str = Field(
        description="Name of the text of the held-out loss; its documents of the role validation are read."
    )
    tokens: int = Field(ge=1, description="Tokens to train on, rounded up to whole steps.")
    length: int = Field(default=512, ge=2, description="Tokens in a window, for training and for the held-out loss.")
    pack: bool = Field(
        default=True, description="Pack several documents into a window; false: one window per document, cut or padded."
    )
    validation_windows: int = Field(default=64, ge=1, description="Number of windows of the held-out loss.")
    batch_size: int = Field(default=32, ge=1, description="Windows per step.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Windows per forward pass on a device (gradient accumulation), where batch_size does not fit in "
        "its memory; a divisor of batch_size.",
    )
    gpus: int = Field(
        default=1,
        ge=1,
        description="GPUs of one machine that train together: the model and the windows of a step are divided among "
        "them, and the result is the same up to rounding. batch_size must be a multiple of gpus times "
        "micro_batch_size.",
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant",
        description="Learning-rate schedule after warm-up. With `constant`, the loss at a budget of the ladder does "
        "not depend on how long the run continues; `cosine` decays to zero at the last step.",
    )
    warmup: float = Field(
        default=10, ge=0, description="Linear warm-up: a fraction of the steps if below 1, otherwise a number of steps."
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="Decay rates of AdamW's first and second moments."
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="Weight decay of matrices; vectors (biases, norms) have none."
    )
    gradient_clip: float = Field(default=1.0, ge=0, description="Maximum gradient norm; 0 disables clipping.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Autocast dtype; master weights are float32. `auto`: bfloat16 where the GPU supports it, otherwise "
        "float32.",
    )
    stop_gain: float | None = Field(
        default=None,
        gt=0,
        description="Early stopping, in nats per token: stop at a budget of the study's ladder where the power law "
        "fitted to the held-out losses so far predicts that the remaining tokens gain at most this. Needs five budgets "
        "or more. Null: train to the end.",
    )

    @model_validator(mode="after")
    def _micro_batches_fill_a_step(self) -> RecoverOptions:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; "
                "make it one."
            )
        if self.batch_size % (self.gpus * (self.micro_batch_size or 1)):
            at_once = f" times micro_batch_size {self.micro_batch_size}" if self.micro_batch_size else ""
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gpus {self.gpus}{at_once}; make it one."
            )
        return self

    @model_validator(mode="after")
    def _betas_are_decay_rates(self) -> RecoverOptions:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; both must be at least 0 and less than 1.")
        return self

    @model_validator(mode="after")
    def _stop_gain_needs_a_constant_rate(self) -> RecoverOptions:
        if self.stop_gain is not None and self.schedule == "cosine":
            raise ValueError(
                "stop_gain is set with the schedule 'cosine', whose losses do not predict the loss at the end, after "
                "the learning rate has decayed; use the schedule 'constant', or leave stop_gain out."
            )
        return self
