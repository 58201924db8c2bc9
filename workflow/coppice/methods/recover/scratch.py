"""Training from scratch: the parent's architecture with weights drawn anew, the control of what inherited weights give.

Liu et al., Rethinking the Value of Network Pruning (arXiv 1810.05270), section 3: Scratch-E trains the pruned
architecture on as much as the model that it is compared with, Scratch-B for as much computation. A training step costs
about 6 N FLOPs a token (N parameters), so that Scratch-B reads D N_dense / N tokens for D of Scratch-E.

Weights are drawn by the architecture's own initializer; norms begin at one, biases at zero. The masks of a masked
parent are part of its architecture: what they prune is zero and stays zero. N leaves these zeros out, as the FLOPs of a
product do that skips them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from coppice.lazy import torch
from coppice.methods.contracts import Source
from coppice.methods.options import RecoverOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from coppice.records.manifest import Manifest

SOURCE = Source(
    title="Rethinking the Value of Network Pruning",
    identifier="arXiv 1810.05270",
    equation="section 3 (Scratch-E and Scratch-B)",
)
NEEDS: frozenset[str] = frozenset()
MAKES: frozenset[str] = frozenset()
_COMPOSED = "because its initializer is that of whole linears, and factors drawn by it multiply to far smaller weights"
REFUSES = {
    "quantized": "because packed integers cannot be drawn anew and trained; train before the step that quantizes",
    "factorized": f"{_COMPOSED}; train the node from before the step that factorizes",
    "compensated": f"{_COMPOSED}; train the node from before its linears were given low-rank updates",
    "quantized-cache": "because its keys and values are rounded while it runs; train before the step that rounds them",
}


class Options(RecoverOptions):
    """Those of every training method, and what the budget of tokens stands for."""

    equal: Literal["tokens", "flops"] = Field(
        default="tokens",
        description="`tokens`: trains on `tokens` (Scratch-E). `flops`: on as many more as the node has fewer "
        "parameters than the dense model, zeros of masks left out (Scratch-B).",
    )


def tokens(options: Options, parent: Manifest) -> int:
    """To train on: D, or D N_dense / N rounded up; both N from the parent's manifest."""
    if options.equal == "tokens":
        return options.tokens
    return -(-options.tokens * parent.dense_parameters // parent.parameters.nonzero)


def prepare(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """Draws every weight from torch's seed, under the masks that there are, and lets all of them train."""
    from coppice.models.layers import mask, weight_matrices

    masks = {name: kept for name, linear in weight_matrices(model).items() if (kept := mask(linear)) is not None}
    # On the CPU, so that a seed gives the same weights on every device.
    drawn = type(model)(model.config).state_dict()
    model.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn[name])
        for name, kept in masks.items():
            model.get_submodule(name).weight.masked_fill_(~kept, 0)
    for name, kept in masks.items():
        model.get_submodule(name).weight.register_hook(lambda gradient, kept=kept: gradient * kept)
    return model


def finish(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is: its weights were trained in place."""
    return model
