"""What training methods share with the trainer: the clock, groups of parameters, the default optimizer, whole tensors.

Where several GPUs train one model, its parameters are divided among them between steps (DTensors), and so are their
gradients and the optimizer's state. A hook that needs a whole matrix, such as a threshold over all of its weights, uses
`full_tensor`, and `distribute_like` to bring the result back: weight.mul_(distribute_like(mask, weight)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from coppice.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from coppice.methods.options import RecoverOptions


@dataclass(frozen=True)
class Clock:
    """The position of a run, as the hooks of a step see it; the same in every process and in a resumed run.

    step: the number of the current step, from 1 to `steps`; a run with `stop_gain` may end before. tokens: read by the
    end of the step. seed: of the run; what a hook draws, it draws from a generator of its own, seeded by `seed` and
    `step` alone. options: those of the method.
    """

    step: int
    steps: int
    tokens: int
    seed: int
    options: Any


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are updated alike.

    learning_rate_multiplier: of the learning rate of each step. weight_decay: as the optimizer takes it. maximize:
    gradient ascent, as for the multipliers of a constraint.
    """

    parameters: Sequence[nn.Parameter]
    learning_rate_multiplier: float = 1.0
    weight_decay: float = 0.0
    maximize: bool = False


class OptimizerGroup(TypedDict):
    """A group as torch's optimizers take it."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    maximize: bool


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def matrices_and_vectors(model: nn.Module, options: RecoverOptions) -> list[ParameterGroup]:
    """The default groups: matrices decay by options.weight_decay, vectors (biases, norms) do not."""
    trained = trained_parameters(model).values()
    return [
        ParameterGroup([parameter for parameter in trained if parameter.ndim > 1], weight_decay=options.weight_decay),
        ParameterGroup([parameter for parameter in trained if parameter.ndim <= 1]),
    ]


def adamw(groups: list[OptimizerGroup], options: RecoverOptions) -> Optimizer:
    """The default optimizer."""
    return torch.optim.AdamW(groups, betas=options.betas)


def mask_gradients(masks: Mapping[nn.Linear, Tensor]) -> None:
    """From now on, weights where a linear's mask [m, n] is False receive no gradient: g <- g (.) M."""
    for linear, kept in masks.items():
        linear.weight.register_hook(lambda gradient, kept=kept: gradient * kept)


def full_tensor(tensor: Tensor) -> Tensor:
    """A divided tensor put together, on every process; any other as it is. Every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distribute_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, equal on every process, on the device of `other` and divided as `other` is."""
    tensor = tensor.to(other.device)
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
