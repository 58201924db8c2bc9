"""Low-rank adaptation: the weights are frozen, and low-rank updates of the decoder's linears are trained.

LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), equation 3: h = W x + (alpha / r) B A x, with
A [r, n] drawn from Kaiming's uniform distribution and B [m, r] zero at the start.

After training the update is merged into a plain linear: W <- W + (alpha / r) B A. A masked or quantized one would lose
its zeros or its grid; it keeps the update as a low-rank correction, second = (alpha / r) B and first = A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from coppice.lazy import torch
from coppice.methods.declaration import Resources, Source, TrainingMethod
from coppice.methods.incompatible import QUANTIZED_CACHE
from coppice.methods.options import MethodOptions, RecoverOptions
from coppice.models.architectures.base import blocks

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
    """The options of every training method, and the rank and scale of the update."""

    rank: int = Field(default=8, ge=1, description="Rank r of every linear's update.")
    alpha: float = Field(default=16, gt=0, description="The update is multiplied by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout rate of the update's inputs in training.")


def traits(parent: frozenset[str], options: MethodOptions) -> frozenset[str]:
    """Those of the parent; "compensated" as well where masked or quantized linears keep their updates."""
    return parent | {"compensated"} if parent & {"masked", "quantized"} else parent


def prepare(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """Adds an update to each linear and factor of the blocks; only updates train. A is drawn from torch's seed."""
    from peft import LoraConfig, inject_adapter_in_model

    from coppice.models.modules import weight_matrices

    linears = {id(linear) for linear in weight_matrices(blocks(model)).values()}
    targets = [name for name, module in model.named_modules() if id(module) in linears]
    configuration = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        bias="none",
        use_rslora=False,
    )
    inject_adapter_in_model(configuration, model, ADAPTER)
    return model


def finish(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """Merges each update into its linear; a masked or quantized one becomes a `LowRankCorrectionLinear`."""
    from peft.tuners.lora import Linear as AdaptedLinear

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    with torch.no_grad():
        for name, module in adapted.items():
            model.set_submodule(name, _merge_update(module))
    del model.peft_config
    return model.requires_grad_(True)


def _merge_update(adapted: AdaptedLinear) -> nn.Module:
    """The module that replaces an adapted linear after training."""
    from coppice.models.modules import LowRankCorrectionLinear, PackedForm

    base = adapted.get_base_layer()
    first = adapted.get_parameter(f"lora_A.{ADAPTER}.weight")
    second = adapted.scaling[ADAPTER] * adapted.get_parameter(f"lora_B.{ADAPTER}.weight")
    if not isinstance(base, PackedForm) and not getattr(base, "masked", False):
        base.weight += second @ first
        return base
    corrected = LowRankCorrectionLinear(base, len(first), device=first.device, dtype=first.dtype)
    corrected.compensation.first.weight.copy_(first)
    corrected.compensation.second.weight.copy_(second)
    return corrected


METHOD = TrainingMethod(
    source=SOURCE,
    options=Options,
    incompatible_with={
        "compensated": "its linears already have a low-rank correction; train that with full",
        "quantized-activations": "an update merged into the weights would see quantized inputs, on which it was not "
        "trained; use full, or train before the step that quantizes them",
        "quantized-cache": QUANTIZED_CACHE,
    },
    traits=traits,
    prepare=prepare,
    finish=finish,
    resources=Resources(reach="model", frozen_base=True, small_state=True),
)
