"""Whether two nodes that differ by their seed alone lie in one basin, and whether they compute the same.

Zhou et al., A Three-regime Model of Network Pruning (arXiv 2305.18383). Along theta(t) = (1 - t) theta_1 + t theta_2,
with theta_1 the node, theta_2 the same node of the study's seed and t at equally spaced points from 0 to 1:

    mc = err_mean - err(theta(t*)),   t* = argmax_t |err_mean - err(theta(t))|,   err_mean = 1/2 (err(0) + err(1))

with err the share of next tokens that the model's most probable token misses: below 0 where a barrier parts the two,
about 0 where they are connected. Of points equally far from the mean, the one with the least error is t*, so that mc is
at least 0 wherever err is convex in t. The paper takes err on the training data; here it is on a protocol's windows.

The barrier of the loss is that of Entezari et al. (arXiv 2110.06296): max_t loss(t) - (1 - t) loss(0) - t loss(1).

CKA compares what the two compute on the same tokens: linear CKA (Kornblith et al., arXiv 1905.00414) of the logits,

    |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F),   X, Y [tokens, vocabulary] with centred columns.

Regimes: I where mc < -barrier; otherwise II-B where CKA >= similarity, and II-A where it is less. The paper reads the
borders off its figures; the two thresholds are options.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np

from coppice.errors import UserError
from coppice.evaluation.batching import sequences_at_once
from coppice.evaluation.perplexity import LOGITS, PROTOCOL_FIELDS
from coppice.lazy import torch
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from coppice.data.windows import Windows

REGIMES = {
    "I": "poorly connected",
    "II-A": "connected, dissimilar outputs",
    "II-B": "connected, similar outputs",
}


def measure(
    model: PreTrainedModel,
    other: PreTrainedModel,
    windows: Windows,
    name: str,
    *,
    points: int,
    barrier: float,
    similarity: float,
) -> list[Json]:
    """Mode connectivity, barrier of the loss and CKA of two models by the protocol `name`: rows of metrics.

    points: of the path, both ends among them. barrier: an error; similarity: a CKA (see above). Raises UserError where
    the two cannot be interpolated, or the windows are longer than the models' context.
    """
    length, context = windows.manifest.length, model.config.max_position_embeddings
    if length > context:
        raise UserError(
            f"The protocol {name!r} has windows of {length} tokens, but the model's context ends at {context}; "
            "shorten them."
        )
    refuse_different(model, other)
    path = np.linspace(0, 1, points)
    losses, errors = np.array([loss_and_error(between, windows) for between in interpolate(model, other, path)]).T
    connectivity, furthest = mode_connectivity(errors)
    barriers = losses - ((1 - path) * losses[0] + path * losses[-1])
    cka = linear_cka(outputs(model, other, windows))
    regime = classify(connectivity, cka, barrier, similarity)
    scored = int((windows.documents[:, 1:] >= 0).sum())
    shared: Json = {
        "stderr": None,
        "n": scored,
        "task": name,
        "regime": regime,
        "regime_meaning": REGIMES[regime],
        "thresholds": {"barrier": barrier, "similarity": similarity},
        "protocol": {
            **windows.manifest.model_dump(include=PROTOCOL_FIELDS),
            "tokens_fingerprint": windows.manifest.fingerprint,
        },
    }
    rounded = path.round(6).tolist()
    return [
        {
            "metric": f"mode_connectivity_{name}",
            "value": connectivity,
            "unit": "error",
            **shared,
            "at": rounded[furthest],
            "path": rounded,
            "errors": errors.tolist(),
        },
        {
            "metric": f"barrier_loss_{name}",
            "value": float(barriers.max()),
            "unit": "nats/token",
            **shared,
            "at": rounded[int(barriers.argmax())],
            "path": rounded,
            "losses": losses.tolist(),
        },
        {"metric": f"cka_{name}", "value": cka, "unit": "ratio", **shared},
    ]


def refuse_different(model: nn.Module, other: nn.Module) -> None:
    """Raises UserError where the two do not have the same floating tensors."""
    ours, theirs = model.state_dict(), other.state_dict()
    packed = sorted(name for state in (ours, theirs) for name in state if not state[name].is_floating_point())
    if packed:
        raise UserError(
            f"The weights cannot be interpolated, as {packed[0]} is made of packed integers; measure the node from "
            "before the step that quantizes it."
        )
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(state[name].shape) if name in state else "missing" for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"The weights cannot be interpolated, as {name} is {shapes[0]} in the one node and {shapes[1]} in the "
                "other; measure nodes of one shape."
            )


def interpolate(model: nn.Module, other: nn.Module, path: np.ndarray) -> Iterator[nn.Module]:
    """(1 - t) theta_1 + t theta_2 for each t of the path; one model, whose weights change in place. Both ends exact."""
    between = deepcopy(model)
    ends = dict(model.named_parameters()), dict(other.named_parameters())
    for t in path.tolist():
        with torch.no_grad():
            for name, parameter in between.named_parameters():
                parameter.copy_(torch.lerp(ends[0][name], ends[1][name], t))
        yield between


def loss_and_error(model: PreTrainedModel, windows: Windows) -> tuple[float, float]:
    """Mean loss in nats a token, and the share of tokens that are not the most probable one.

    Every token but a window's first is scored; padding is neither seen nor scored.
    """
    loss, wrong, scored = 0.0, 0, 0
    with torch.inference_mode():
        for tokens, kept in batches(model, windows):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1][kept[:, 1:]].float()
            targets = tokens[:, 1:][kept[:, 1:]]
            loss += torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum().item()
            wrong += int((logits.argmax(-1) != targets).sum())
            scored += len(targets)
    return loss / scored, wrong / scored


def batches(model: PreTrainedModel, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [b, t] and which of them are not padding, bool [b, t], on the model's device.

    Padding is on the right, so that what comes before does not see it; what all windows have of it is left out.
    """
    length = windows.tokens.shape[1]
    size = sequences_at_once(model, max(1, min(16, LOGITS // (length * model.config.vocab_size))))
    for start in range(0, len(windows.tokens), size):
        kept = torch.as_tensor(windows.documents[start : start + size]) >= 0
        longest = int(kept.sum(1).max())
        tokens = torch.as_tensor(windows.tokens[start : start + size, :longest]).long()
        yield tokens.to(model.device), kept[:, :longest].to(model.device)


def mode_connectivity(errors: np.ndarray) -> tuple[float, int]:
    """mc from the errors along the path [points], and the index of t*."""
    deviations = (errors[0] + errors[-1]) / 2 - errors
    # Rounded, so that points equally far on both sides of the mean are: the two ends are whenever they differ.
    furthest = int(np.lexsort((errors, -np.abs(deviations).round(12)))[0])
    return float(deviations[furthest]), furthest


def outputs(model: PreTrainedModel, other: PreTrainedModel, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """Of both models, for every token that is not padding, features [tokens, d] that have the CKA of their logits.

    With W = Q R and Q^T Q = 1, logits h W^T are (h R^T) Q^T, and CKA does not depend on Q: d numbers replace the
    vocabulary's.
    """
    heads = [torch.linalg.qr(each.lm_head.weight.detach().double(), mode="r").R for each in (model, other)]
    for tokens, kept in batches(model, windows):
        with torch.inference_mode():
            first, second = (
                each.model(input_ids=tokens, use_cache=False).last_hidden_state[kept].double() @ head.T
                for each, head in zip((model, other), heads, strict=True)
            )
        yield first, second


def linear_cka(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Linear CKA of features x [n, d_1] and y [n, d_2] of the same n samples, which come in pieces; 0 to 1.

    Second moments are gathered in the pieces' dtype, which should be float64, as the mean is taken off afterwards.
    """
    count, width = 0, 0
    total = square = torch.zeros(())
    for x, y in pairs:
        both, width = torch.cat([x, y], 1), x.shape[1]
        count += len(both)
        total = total.to(both) + both.sum(0)
        square = square.to(both) + both.T @ both
    centred = square - total[:, None] * total / count
    first, cross, second = centred[:width, :width], centred[:width, width:], centred[width:, width:]
    return float(cross.square().sum() / (first.norm() * second.norm()))


def classify(connectivity: float, cka: float, barrier: float, similarity: float) -> str:
    """The name of the regime, one of `REGIMES`."""
    if connectivity < -barrier:
        return "I"
    return "II-A" if cka < similarity else "II-B"
