"""Low-rank adaptation: the weights stay, low-rank updates beside the decoder's linears are trained.

LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), equation 3: h = W x + (alpha / r) B A x, with
A [r, n] drawn from Kaiming's uniform distribution and B [m, r] zero at the start.

Afterwards a plain linear takes the update in: W <- W + (alpha / r) B A. A masked or quantized one cannot without
losing its zeros or its grid; the update stays beside it, second = (alpha / r) B and first = A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from coppice.lazy import torch
from coppice.methods.contracts import Source
from coppice.methods.declaration import Resources, TrainingMethod
from coppice.methods.incompatible import QUANTIZED_CACHE
from coppice.methods.options import MethodOptions, RecoverOptions

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as AdaptedLinear
    from torch import nn
    from transformers import PreTrainedModel

SOURCE = Source(
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    identifier="arXiv 2106.09685",
    equation="3",
)
ADAPTER = "default"


class Options(RecoverOptions):
    """Those of every training method, and the shape of the update."""

    rank: int = Field(default=8, ge=1, description="r, of every linear's update.")
    alpha: float = Field(default=16, gt=0, description="The update is multiplied by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the update's inputs dropped in training.")


def traits(parent: frozenset[str], options: MethodOptions) -> frozenset[str]:
    """Those of the parent; "compensated" as well where updates are kept beside masked or quantized linears."""
    return parent | {"compensated"} if parent & {"masked", "quantized"} else parent


def prepare(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """Puts an update beside each linear and factor of the blocks, which alone trains. A is drawn from torch's seed."""
    from peft import LoraConfig, inject_adapter_in_model

    from coppice.models.layers import blocks, weight_matrices

    inside = {id(linear) for linear in weight_matrices(blocks(model)).values()}
    targets = [name for name, module in model.named_modules() if id(module) in inside]
    configuration = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        bias="none",
        use_rslora=False,
    )
    return inject_adapter_in_model(configuration, model, ADAPTER)


def finish(model: PreTrainedModel) -> PreTrainedModel:
    """Takes each update into its linear, or leaves it beside a masked or quantized one as `Compensated`."""
    from peft.tuners.lora import Linear as AdaptedLinear

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    with torch.no_grad():
        for name, module in adapted.items():
            model.set_submodule(name, _settled(module))
    del model.peft_config
    return model.requires_grad_(True)


def _settled(adapted: AdaptedLinear) -> nn.Module:
    """What stands in an adapted linear's place after training."""
    from coppice.models.layers import PACKED, LowRankCorrectedLinear

    base = adapted.get_base_layer()
    first = adapted.lora_A[ADAPTER].weight
    second = adapted.scaling[ADAPTER] * adapted.lora_B[ADAPTER].weight
    if not isinstance(base, PACKED) and not getattr(base, "masked", False):
        base.weight += second @ first
        return base
    compensated = LowRankCorrectedLinear(base, len(first), device=first.device, dtype=first.dtype)
    compensated.compensation.first.weight.copy_(first)
    compensated.compensation.second.weight.copy_(second)
    return compensated


METHOD = TrainingMethod(
    source=SOURCE,
    options=Options,
    incompatible_with={
        "compensated": "its linears already have an update beside them; train that one with full",
        "quantized-activations": "an update merged into the weights would see rounded inputs, and was not trained so; "
        "use full, or train before the step that rounds them",
        "quantized-cache": QUANTIZED_CACHE,
    },
    traits=traits,
    prepare=prepare,
    finish=finish,
    resources=Resources(reach="model", frozen_base=True, small_state=True),
)
