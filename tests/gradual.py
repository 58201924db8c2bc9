"""A training method that uses every hook, as another package would bring it: gradual pruning with a clock.

Every second step a linear's weights are pruned by the running mean of their size, to the cubic schedule of Zhu and
Gupta (arXiv 1710.01878): s_t = s (1 - (1 - t / T)^3). The last norm ascends, and the optimizer is SGD with momentum.
Neither the running means nor the count of prunings can be computed again from the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coppice.methods.declaration import Resources, Source, TrainingMethod
from coppice.methods.options import RecoverOptions
from coppice.methods.registry import Method, methods
from coppice.methods.training import Clock, ParameterGroup, distribute_like, full_tensor
from coppice.models.architectures.base import blocks
from coppice.models.modules import weight_matrices


class Options(RecoverOptions):
    sparsity: float = 0.5


def pruned_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {name: linear for name, linear in weight_matrices(blocks(model)).items() if name.endswith("down_proj")}


def prepare(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    model.requires_grad_(True)
    for linear in pruned_linears(model).values():
        linear.register_buffer("size", torch.zeros_like(linear.weight), persistent=False)
    model.prunings = 0
    return model


def parameter_groups(model: PreTrainedModel, options: Options) -> list[ParameterGroup]:
    norm = model.model.norm.weight
    others = [parameter for parameter in model.parameters() if parameter is not norm]
    return [ParameterGroup(others, weight_decay=0.01), ParameterGroup([norm], 0.1, maximize=True)]


def optimizer(groups: list[dict[str, Any]], options: Options) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9)


def before_step(model: PreTrainedModel, clock: Clock) -> None:
    for linear in pruned_linears(model).values():
        linear.size.mul_(0.9).add_(full_tensor(linear.weight).abs())


def after_step(model: PreTrainedModel, clock: Clock) -> None:
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.prunings += clock.step % 2
    sparsity = clock.options.sparsity * (1 - (1 - 2 * model.prunings / clock.steps) ** 3)
    for linear in pruned_linears(model).values():
        pruned = int(sparsity * linear.size.numel())
        if pruned:
            kept = linear.size > linear.size.flatten().kthvalue(pruned).values
            linear.weight.mul_(distribute_like(kept, linear.weight))
            linear.size.mul_(kept)


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    sizes = {name: linear.size for name, linear in pruned_linears(model).items()}
    return {"prunings": torch.tensor(model.prunings), **sizes}


def restore(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    model.prunings = int(tensors["prunings"])
    for name, linear in pruned_linears(model).items():
        linear.size.copy_(tensors[name])


def finish(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    for linear in pruned_linears(model).values():
        del linear.size
        linear.masked = True
    return model


METHOD = TrainingMethod(
    source=Source("To prune, or not to prune", "arXiv 1710.01878", "1"),
    options=Options,
    adds_traits=frozenset({"masked"}),
    resources=Resources(reach="model"),
    prepare=prepare,
    finish=finish,
    parameter_groups=parameter_groups,
    optimizer=optimizer,
    before_step=before_step,
    after_step=after_step,
    state=state,
    restore=restore,
)


def register() -> None:
    """Adds the method to this process's registry."""
    methods()["gradual"] = Method("gradual", "recover", METHOD, Path(__file__))
