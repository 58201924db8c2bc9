"""Training from scratch: the parent's architecture with newly initialized weights, the control for inherited weights.

Liu et al., Rethinking the Value of Network Pruning (arXiv 1810.05270), section 3: Scratch-E trains the pruned
architecture on as many tokens as the model that it is compared with, Scratch-B for as much computation. A training step
costs about 6 N FLOPs a token (N parameters), so that Scratch-B reads D N_dense / N tokens for D of Scratch-E.

Weights are drawn by the architecture's own initializer; norms start at one, biases at zero. The masks of a masked
parent are part of its architecture: pruned weights are zero and stay zero. N does not count these zeros, nor do the
FLOPs of a product that skips them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from coppice.lazy import torch
from coppice.methods.declaration import Resources, Source, TrainingMethod
from coppice.methods.incompatible import QUANTIZED_CACHE
from coppice.methods.options import RecoverOptions
from coppice.methods.training import mask_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from coppice.records.manifest import Manifest

SOURCE = Source(
    title="Rethinking the Value of Network Pruning",
    identifier="arXiv 1810.05270",
    equation="section 3 (Scratch-E and Scratch-B)",
)
_COMPOSED = "its initializer is that of whole linears, and factors drawn by it multiply to far smaller weights"


class Options(RecoverOptions):
    """The options of every training method, and the meaning of the token budget."""

    equal: Literal["tokens", "flops"] = Field(
        default="tokens",
        description="`tokens`: train on `tokens` tokens (Scratch-E). `flops`: on `tokens` times the dense model's "
        "parameters over the node's, pruned weights not counted: equal training FLOPs (Scratch-B).",
    )


def tokens(options: Options, parent: Manifest) -> int:
    """Tokens to train on: D, or D N_dense / N rounded up; both N from the parent's manifest."""
    if options.equal == "tokens":
        return options.tokens
    return -(-options.tokens * parent.dense_parameters // parent.parameters.nonzero)


def prepare(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """Draws every weight from torch's seed, applies the parent's masks, and lets all weights train."""
    from coppice.models.modules import mask, weight_matrices

    linears = weight_matrices(model).values()
    masks = {linear: kept for linear in linears if (kept := mask(linear)) is not None}
    # On the CPU, so that a seed gives the same weights on every device.
    weights = type(model)(model.config).state_dict()
    # Narrower blocks take a part: initial weights are drawn independently, each from the same distribution.
    model.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name][tuple(map(slice, parameter.shape))])
        for linear, kept in masks.items():
            linear.weight.masked_fill_(~kept, 0)
    mask_gradients(masks)
    return model


def finish(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """The model as it is: its weights were trained in place."""
    return model


METHOD = TrainingMethod(
    source=SOURCE,
    options=Options,
    incompatible_with={
        "quantized": "packed integers cannot be initialized and trained; train before the step that quantizes",
        "factorized": f"{_COMPOSED}; train the node from before the step that factorizes",
        "compensated": f"{_COMPOSED}; train the node from before its linears were given low-rank updates",
        "quantized-cache": QUANTIZED_CACHE,
    },
    prepare=prepare,
    finish=finish,
    tokens=tokens,
    resources=Resources(reach="model", redraws=True),
)
