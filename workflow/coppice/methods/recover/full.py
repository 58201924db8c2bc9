"""Continued pre-training of all weights: embeddings, norms, biases, linears and factors.

Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining Methods (arXiv 2402.02834),
section 3.3: L = -1/T sum_t log p(x_t | x_<t), by AdamW.

A masked weight w (.) M is trained on its kept entries only: g <- g (.) M. AdamW then keeps pruned entries at exactly
zero, as both moments, the update and the decay of a zero entry with zero gradient are zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coppice.methods.declaration import Resources, Source, TrainingMethod
from coppice.methods.incompatible import QUANTIZED_CACHE
from coppice.methods.options import RecoverOptions
from coppice.methods.training import mask_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOURCE = Source(
    title="Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining Methods",
    identifier="arXiv 2402.02834",
    equation="section 3.3 (continued pre-training)",
)


class Options(RecoverOptions):
    """The options of every training method."""


def prepare(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """Lets every parameter train, and pruned weights of masked linears receive no gradient."""
    from coppice.models.modules import mask, weight_matrices

    model.requires_grad_(True)
    linears = weight_matrices(model).values()
    mask_gradients({linear: kept for linear in linears if (kept := mask(linear)) is not None})
    return model


def finish(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """The model as it is: its weights were trained in place."""
    return model


METHOD = TrainingMethod(
    source=SOURCE,
    options=Options,
    incompatible_with={
        "quantized": "packed integers cannot be trained; use lora",
        "quantized-cache": QUANTIZED_CACHE,
    },
    prepare=prepare,
    finish=finish,
    resources=Resources(reach="model"),
)
