"""A whole decoder with its calibration windows, for methods that decide from the loss or from all layers at once.

Implements `models.contracts.Decoder`, on the device that the model is on. Weights, outputs and blocks are exchanged
for the time of one call and are then as before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from coppice.errors import UserError
from coppice.models import surgery
from coppice.models.architectures.base import architecture_of, blocks, head_dim
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.modules import Replaceable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Outputs = Callable[[str, Tensor], Tensor]


class WholeDecoder:
    """names: the linears in the model's order. tokens: [w, t] int64, kept: [w, t] bool, or None where none were given.

    read(index) -> the parent's moments of a block by the linear's name within it; kinds: tensors by kind of statistics.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        linears: Mapping[str, Replaceable],
        as_linear: Callable[[str, Replaceable], Linear],
        read: Callable[[int], dict[str, LinearStatistics]],
        kinds: Mapping[str, dict[str, Tensor]],
        tokens: Tensor | None,
        kept: Tensor | None,
        seed: int,
    ) -> None:
        self.model, self.seed = model, seed
        self.modules: dict[str, Any] = dict(linears)
        self.names = list(linears)
        self.windows = 0 if tokens is None else len(tokens)
        self.head_dim, self.paths = head_dim(model.config), architecture_of(model).linears
        self.structure = surgery.structure(model)
        self.kinds = kinds
        self._as_linear = as_linear
        self._windows = [] if tokens is None or kept is None else list(zip(tokens, kept, strict=True))
        # Names come block by block: the last one read serves all of its linears.
        self._read = lru_cache(maxsize=1)(read)

    def linear(self, name: str) -> Linear:
        return self._as_linear(name, self.modules[name])

    def statistics(self, name: str) -> LinearStatistics:
        index, path = architecture_of(self.model).place(name)
        return self._read(index)[path]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        return self.kinds[kind]

    def logits(self, window: int, outputs: Outputs | None = None) -> Tensor:
        with self._observe_outputs(outputs):
            return self._forward(self._window(window)[None])[0, :-1]

    def loss(
        self,
        windows: Iterable[int] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        outputs: Outputs | None = None,
        bypass: Collection[int] = (),
    ) -> Tensor:
        indices = range(self.windows) if windows is None else windows
        total: Any = 0.0
        count = 0
        with self._exchange_weights(weights or {}), self._observe_outputs(outputs), self._bypass(bypass):
            for window in indices:
                tokens = self._window(window)
                logits = self._forward(tokens[None])[0, :-1]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                total = total + cross_entropy(logits, tokens[1:], reduction="sum")
                count += len(tokens) - 1
        if count == 0:
            raise UserError("No calibration window has two tokens, so no loss can be measured.")
        return total / count

    @torch.no_grad()
    def hidden_states(self, window: int) -> Tensor:
        states: list[Tensor] = []

        def keep_input(block: nn.Module, positional: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> None:
            states.append(positional[0] if positional else keywords["hidden_states"])

        hooks = [block.register_forward_pre_hook(keep_input, with_kwargs=True) for block in blocks(self.model)]
        # What leaves the last block is what enters the last norm.
        final_norm = self.model.get_submodule(architecture_of(self.model).final_norm)
        hooks.append(final_norm.register_forward_pre_hook(keep_input, with_kwargs=True))
        try:
            self._forward(self._window(window)[None])
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(states)

    def gradients(self, batch: int = 1) -> Iterator[dict[str, Tensor]]:
        weights = {name: module.weight.requires_grad_() for name, module in self.modules.items()}
        for first in range(0, self.windows, batch):
            with torch.enable_grad():
                loss = self.loss(range(first, min(first + batch, self.windows)))
                gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
            for name, gradient in gradients.items():
                if not torch.isfinite(gradient).all():
                    raise UserError(f"{name}: its gradient is not finite; calibrate in a wider dtype.")
            yield gradients
        for weight in weights.values():
            weight.requires_grad_(False)

    def _window(self, window: int) -> Tensor:
        """[t] the tokens of a window without its padding, on the model's device."""
        tokens, kept = self._windows[window]
        return tokens[kept].to(self.model.device)

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    @contextmanager
    def _bypass(self, indices: Collection[int]) -> Iterator[None]:
        def pass_on(hidden_states: Tensor, **keywords: Any) -> Tensor:
            return hidden_states

        bypassed = [blocks(self.model)[index] for index in sorted(set(indices))]
        for block in bypassed:
            block.forward = pass_on
        try:
            yield
        finally:
            for block in bypassed:
                del block.forward

    @contextmanager
    def _exchange_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
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
    def _observe_outputs(self, outputs: Outputs | None) -> Iterator[None]:
        def observe(name: str, exchange: Outputs) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            return lambda module, inputs, y: exchange(name, y[0])[None]

        hooks = []
        if outputs is not None:
            hooks = [module.register_forward_hook(observe(name, outputs)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
