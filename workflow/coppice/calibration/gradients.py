"""Taylor importances of a decoder's units: what the loss would change by without them.

LLM-Pruner: On the Structural Pruning of Large Language Models (arXiv 2305.11627), section 3.2, equations 3 to 5.
Key/value groups and neurons, and which rows and columns of the linears belong to them, are those of `surgery`. Weights
of norms across heads belong to no unit here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from coppice.calibration.walk import windows_in_a_batch
from coppice.errors import UserError
from coppice.models.architectures.base import UNITS, architecture_of, blocks
from coppice.models.contracts import Role
from coppice.models.surgery import block_widths, structure

IMPORTANCES = ("vector", "first", "second", "mixed")


@dataclass(frozen=True)
class _Member:
    """A linear that belongs to a block's units; `reduced` is the dimension of its weight that units do not index."""

    name: str
    block: int
    unit: str
    reduced: int
    linear: nn.Linear

    @property
    def has_bias(self) -> bool:
        """Whether the linear has a bias that belongs to its units: rows take their bias along, columns have none."""
        return self.reduced == 1 and self.linear.bias is not None


@dataclass
class _Moments:
    """Over the windows seen: the sum of their gradients and of the squares, [m, n (+ 1 for the bias)]."""

    gradient: Tensor
    square: Tensor
    windows: int = 0


def gather(
    model: PreTrainedModel, tokens: Tensor, kept: Tensor, device: str, output: Path
) -> dict[str, dict[str, str]]:
    """Writes the Taylor scores of every unit."""
    scores = unit_scores(model.to(device), tokens.to(device), kept.to(device), windows_in_a_batch(tokens))
    save_file({name: score.cpu().contiguous() for name, score in scores.items()}, output / "gradients.safetensors")
    return {}


def unit_scores(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor, batch: int) -> dict[str, Tensor]:
    """Importance of each key/value group and neuron: `kv_groups.<importance>` [blocks, kv_groups] and
    `neurons.<importance>` [blocks, neurons], for each of `IMPORTANCES`, in float32 (float64 for a float64 model).

    tokens: [windows, length]; attention_mask: [windows, length], True where a token is not padding. batch: windows that
    go through the model at once; it changes memory and speed, not the scores.
    With l_s the mean next-token cross entropy (nats) of window s over its N windows that predict any token:

        g = 1/N sum_s dl_s/dw        the gradient of the mean loss
        a = 1/N sum_s (dl_s/dw)^2    the diagonal of the empirical Fisher matrix: squares of a window's own gradient

    For each row of q, k, v, gate, up (its bias included) and column of o, down, over its weights w:

        vector |sum w g|    first sum |w g|    second sum w^2 a    mixed sum |w g - w^2 a / 2|

    and a unit's score is the sum over its rows and columns. Memory in addition to the model and the activations of a
    batch: nothing lasting when all windows go in one batch, else g and a of the blocks' linears, two float32 copies.
    Raises UserError when the blocks are of different widths, when no window predicts a token, and when a linear's
    output, a window's loss or a gradient is not finite.
    """
    model.eval()
    if len(set(block_widths(model))) > 1:
        raise UserError(
            "Taylor importances compare as many units in every block, and the blocks of this model are of different "
            "widths; use a method that reads other statistics, or the node from before that step."
        )
    predicted = (attention_mask[:, 1:] & attention_mask[:, :-1]).bool()
    used = predicted.any(1)
    if not used.any():
        raise UserError("No calibration window has two tokens in a row, so no loss has gradients.")
    tokens, attention_mask, predicted = (
        tensor[used].to(model.device) for tensor in (tokens.long(), attention_mask, predicted)
    )
    family, units, members = architecture_of(model), structure(model), _members(model)
    dtype = torch.promote_types(model.dtype, torch.float32)
    scores = {
        f"{unit}.{importance}": torch.zeros(units.blocks, getattr(units, unit), dtype=dtype, device=model.device)
        for unit in ("kv_groups", "neurons")
        for importance in IMPORTANCES
    }
    moments: dict[str, _Moments] = {}

    def collect(member: _Member, x: Tensor, delta: Tensor) -> None:
        moment = moments.pop(member.name, None) or _no_moments(member, dtype)
        _accumulate(moment, member, x, delta)
        if moment.windows < len(tokens):
            moments[member.name] = moment
            return
        for importance, score in _member_scores(moment, member, getattr(units, member.unit)).items():
            scores[f"{member.unit}.{importance}"][member.block] += score

    with _freeze(model), _collecting(members, collect):
        for start in range(0, len(tokens), batch):
            part = slice(start, start + batch)
            losses = _losses(model, tokens[part], attention_mask[part], predicted[part])
            if not torch.isfinite(losses).all():
                raise UserError(
                    "The loss of a calibration window is not finite although every block's output is; check "
                    f"{family.final_norm} and {family.head}, or calibrate in a wider dtype."
                )
            # Windows do not see each other, so the gradient of the sum at window s is that of l_s alone.
            losses.sum().backward()
    return scores


def salience(weight: Tensor, gradient: Tensor, fisher: Tensor, reduced: int) -> dict[str, Tensor]:
    """The four importances of the rows (reduced = 1) or columns (reduced = 0) of one matrix [m, n].

    gradient: g and fisher: a, [m, n], as in `unit_scores`.
    """
    first, second = weight * gradient, weight.square() * fisher
    return {
        "vector": first.sum(reduced).abs(),
        "first": first.abs().sum(reduced),
        "second": second.sum(reduced),
        "mixed": (first - second / 2).abs().sum(reduced),
    }


def fold(channels: Tensor, units: int) -> Tensor:
    """[units w] -> [units]: sums the w channels of each unit, which lie side by side.

    w = 1 for neurons, h for the rows of k and v, and r h for the rows of q and the columns of o: the query heads of a
    key/value group are contiguous.
    """
    return channels.view(units, -1).sum(1)


def _members(model: PreTrainedModel) -> list[_Member]:
    family = architecture_of(model)
    return [
        _Member(family.full_name(index, family.linears[role]), index, *_unit(role), linear)
        for index, block in enumerate(blocks(model))
        for role, linear in zip(UNITS, family.modules(block, tuple(UNITS)), strict=True)
    ]


def _unit(role: Role) -> tuple[str, int]:
    """The unit of a role's linear, and the dimension of its weight that the units do not index."""
    unit, indexed = UNITS[role]
    return unit, 1 - indexed


def _no_moments(member: _Member, dtype: torch.dtype) -> _Moments:
    rows, columns = member.linear.weight.shape
    zeros = torch.zeros(rows, columns + member.has_bias, dtype=dtype, device=member.linear.weight.device)
    return _Moments(zeros, zeros.clone())


def _accumulate(moment: _Moments, member: _Member, x: Tensor, delta: Tensor) -> None:
    """Adds dl_s/dW = delta_s^T x_s of each window: x [b, t, n] the inputs, delta [b, t, m] = dl/dy at the outputs."""
    x, delta = x.to(moment.gradient.dtype), delta.to(moment.gradient.dtype)
    if member.has_bias:
        x = nn.functional.pad(x, (0, 1), value=1.0)
    for window_x, window_delta in zip(x, delta, strict=True):
        gradient = window_delta.T @ window_x
        moment.gradient += gradient
        moment.square.addcmul_(gradient, gradient)
    moment.windows += len(x)


def _member_scores(moment: _Moments, member: _Member, units: int) -> dict[str, Tensor]:
    if not torch.isfinite(moment.square).all():
        raise UserError(
            f"The gradient of {member.name} is not finite on the calibration text; calibrate in a wider dtype."
        )
    weight = member.linear.weight.detach().to(moment.gradient.dtype)
    if member.has_bias:
        weight = torch.cat([weight, member.linear.bias.detach().to(weight.dtype)[:, None]], 1)
    g, a = moment.gradient / moment.windows, moment.square / moment.windows
    return {name: fold(channels, units) for name, channels in salience(weight, g, a, member.reduced).items()}


def _losses(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor, predicted: Tensor) -> Tensor:
    """[b] mean next-token cross entropy of each window, differentiable in its embeddings."""
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.masked_fill(~predicted, 0).sum(1) / predicted.sum(1)


@contextmanager
def _freeze(model: nn.Module) -> Iterator[None]:
    """Autograd leaves the weights alone: their gradients are taken a window at a time from inputs and outputs."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _collecting(members: list[_Member], collect: Callable[[_Member, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls collect(member, x, delta) in each backward pass, for each member that the forward pass went through."""

    def observe(member: _Member) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if not torch.isfinite(output).all():
                raise UserError(
                    f"The output of {member.name} is not finite on the calibration text; check its weights and those "
                    "before it, or calibrate in a wider dtype."
                )
            x = inputs[0].detach()
            output.register_hook(lambda delta: collect(member, x, delta))

        return hook

    handles = [member.linear.register_forward_hook(observe(member)) for member in members]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
