"""A whole decoder with its calibration windows, for methods that decide from the loss or from all layers at once.

Implements `methods.base.Decoder`, on the device that the model is on. Weights and outputs are exchanged for the time of
one call and are then as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from coppice.errors import UserError
from coppice.methods.contracts import Linear, LinearStatistics
from coppice.models.architectures.base import architecture_of, head_dim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Outputs = Callable[[str, Tensor], Tensor]


class WholeDecoder:
    """names: the linears in the model's order. tokens: [w, t] int64, kept: [w, t] bool, or None where none were given.

    read(index) -> the parent's moments of a block by the linear's name within it; gathered: tensors by kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        linears: Mapping[str, nn.Linear],
        as_linear: Callable[[str, nn.Module], Linear],
        read: Callable[[int], dict[str, LinearStatistics]],
        gathered: Mapping[str, dict[str, Tensor]],
        tokens: Tensor | None,
        kept: Tensor | None,
        seed: int,
    ) -> None:
        self.model, self.modules, self.seed = model, dict(linears), seed
        self.names = list(linears)
        self.windows = 0 if tokens is None else len(tokens)
        self.head_dim, self.paths = head_dim(model.config), architecture_of(model).linears
        self._as_linear, self._gathered, self._tokens, self._kept = as_linear, gathered, tokens, kept
        # Names come block by block: the last one read serves all of its linears.
        self._read = lru_cache(maxsize=1)(read)

    def linear(self, name: str) -> Linear:
        return self._as_linear(name, self.modules[name])

    def statistics(self, name: str) -> LinearStatistics:
        index, path = architecture_of(self.model).place(name)
        return self._read(index)[path]

    def gathered(self, kind: str) -> dict[str, Tensor]:
        return self._gathered[kind]

    def logits(self, window: int, outputs: Outputs | None = None) -> Tensor:
        kept = self._kept[window]
        with self._observed(outputs):
            return self._forward(self._tokens[window][kept][None])[0, :-1]

    def loss(
        self,
        windows: Iterable[int] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        outputs: Outputs | None = None,
    ) -> Tensor:
        chosen = range(self.windows) if windows is None else windows
        total, count = 0.0, 0
        with self._exchanged(weights or {}), self._observed(outputs):
            for window in chosen:
                tokens = self._tokens[window][self._kept[window]].to(self.model.device)
                logits = self._forward(tokens[None])[0, :-1]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                total = total + cross_entropy(logits, tokens[1:], reduction="sum")
                count += len(tokens) - 1
        if count == 0:
            raise UserError("No calibration window has two tokens, so there is no loss to measure.")
        return total / count

    def gradients(self, batch: int = 1) -> Iterator[dict[str, Tensor]]:
        weights = {name: module.weight.requires_grad_() for name, module in self.modules.items()}
        for first in range(0, self.windows, batch):
            with torch.enable_grad():
                loss = self.loss(range(first, min(first + batch, self.windows)))
                found = torch.autograd.grad(loss, list(weights.values()))
            for name, gradient in zip(weights, found, strict=True):
                if not torch.isfinite(gradient).all():
                    raise UserError(f"{name}: its gradient is not finite; calibrate in a wider dtype.")
            yield dict(zip(weights, found, strict=True))
        for weight in weights.values():
            weight.requires_grad_(False)

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens.to(self.model.device), use_cache=False).logits

    @contextmanager
    def _exchanged(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        before = {name: self.modules[name].weight for name in weights}
        for name, weight in weights.items():
            # A plain attribute: the weight may be part of a graph.
            del self.modules[name].weight
            self.modules[name].weight = weight.to(before[name].dtype)
        try:
            yield
        finally:
            for name, weight in before.items():
                del self.modules[name].weight
                self.modules[name].weight = weight

    @contextmanager
    def _observed(self, outputs: Outputs | None) -> Iterator[None]:
        def observe(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            return lambda module, inputs, y: outputs(name, y[0])[None]

        hooks = []
        if outputs is not None:
            hooks = [module.register_forward_hook(observe(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
