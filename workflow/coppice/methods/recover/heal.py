"""Healing: trains the small factors of a decomposed model to match the block outputs of the dense root.

Park and Moon, CURing: Large Models Compression via CUR Decomposition (arXiv 2501.04211): everything is frozen but the
link U of W = C U R. For each token that predicts another,

    loss = c (-log p(x_t+1 | x_<=t)) + (1 - c) 1/L sum_l |h_l,t - h*_l,t|^2 / d

with h_l,t [d] the output of block l of the L, h*_l,t that of the dense root, and c = 0.1.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.declaration import Resources, Source, TrainingMethod
from coppice.methods.options import RecoverOptions
from coppice.methods.training import mask_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedModel

SOURCE = Source(
    title="CURing: Large Models Compression via CUR Decomposition",
    identifier="arXiv 2501.04211",
    equation="healing: 0.1 cross-entropy + 0.9 mean squared distance of hidden states",
)


class Options(RecoverOptions):
    """The options of every training method, what trains, and the weights of the two losses."""

    learning_rate: float = Field(default=3e-4, gt=0, description="Peak learning rate.")
    parts: Literal["links", "factors"] = Field(
        default="links",
        description="What trains. `links`: only the link of a CUR decomposition, all factors of other decompositions. "
        "`factors`: all factors.",
    )
    cross_entropy: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Weight of the cross-entropy; the distance of hidden states has the remaining weight.",
    )


def prepare(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """Lets links or factors train and nothing else; pruned weights of masked ones receive no gradient.

    Raises UserError where it has none, or all of them are packed integers.
    """
    from coppice.models.modules import mask

    model.requires_grad_(False)
    factors = _trainable_factors(model, options)
    if not factors:
        raise UserError(
            "Nothing can be healed: no linear of this model consists of factors that can be trained. Heal the node "
            "of a decompose step before it is quantized, or use full."
        )
    for factor in factors:
        factor.weight.requires_grad_(True)
    mask_gradients({factor: kept for factor in factors if (kept := mask(factor)) is not None})
    return model


def loss(model: PreTrainedModel, tokens: Tensor, labels: Tensor, teacher: PreTrainedModel, options: Options) -> Tensor:
    """The loss above, summed over the targets. tokens, labels: [b, t]; labels are not shifted, negative: no target."""
    with torch.no_grad(), _block_outputs(teacher) as teacher_outputs:
        teacher(input_ids=tokens, use_cache=False)
    with _block_outputs(model) as outputs:
        logits = model(input_ids=tokens, use_cache=False).logits
    targets = labels[:, 1:]
    predicts = targets >= 0
    entropy = torch.nn.functional.cross_entropy(logits[:, :-1][predicts].float(), targets[predicts], reduction="sum")
    distances = [
        (output[:, :-1][predicts].float() - target[:, :-1][predicts].float()).square().mean(-1).sum()
        for output, target in zip(outputs, teacher_outputs, strict=True)
    ]
    return options.cross_entropy * entropy + (1 - options.cross_entropy) * sum(distances) / len(distances)


def finish(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """The model as it is: its factors were trained in place."""
    return model.requires_grad_(True)


def _trainable_factors(model: PreTrainedModel, options: Options) -> list[nn.Linear]:
    """What trains. A low-rank correction is not a factor of the linear that it corrects."""
    from coppice.models.modules import (
        CURLinear,
        LowRankCorrectionLinear,
        LowRankLinear,
        PackedForm,
        TensorTrainLinear,
        weight_matrices,
    )

    corrections = {id(module.compensation) for module in model.modules() if isinstance(module, LowRankCorrectionLinear)}
    factors: list[nn.Linear] = []
    for module in model.modules():
        if isinstance(module, CURLinear) and options.parts == "links":
            factors.append(module.link)
        elif isinstance(module, (LowRankLinear, CURLinear, TensorTrainLinear)) and id(module) not in corrections:
            factors.extend(weight_matrices(module).values())
    return [linear for linear in factors if not isinstance(linear, PackedForm)]


@contextmanager
def _block_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list that a forward pass inside the context fills with each block's output [b, t, d]."""
    from coppice.models.architectures.base import blocks

    outputs: list[Tensor] = []

    def record(block: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(record) for block in blocks(model)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


METHOD = TrainingMethod(
    source=SOURCE,
    options=Options,
    incompatible_with={
        "smaller": "its blocks are no longer those of the dense root, whose outputs they are to match; use full",
        "rotated": "its hidden states are rotated relative to those of the dense root; heal before rotating",
    },
    prepare=prepare,
    finish=finish,
    loss=loss,
    resources=Resources(reach="model", teacher=True, frozen_base=True),
)
