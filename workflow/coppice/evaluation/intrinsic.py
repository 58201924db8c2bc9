"""How much of their space the last hidden states of texts fill: entropy, effective rank and nuclear norm.

Sources: Wei et al., Diff-eRank: A Novel Rank-Based Metric for Evaluating Large Language Models (arXiv 2401.17139);
Li et al., Large Language Model Evaluation via Matrix Nuclear-Norm (arXiv 2410.10672). Of one text, R [L, d] are the
states after the last norm, less their mean over the L tokens, each row scaled to unit length.

- matrix entropy H = - sum_i l_i ln l_i over the eigenvalues l_i of R^T R / tr(R^T R), in nats, shown as H / ln d; the
  effective rank is e^H;
- the difference of effective ranks is that of a randomly initialised model less the node's;
- matrix nuclear norm = sum of the min(L, d) largest lengths of columns of R, by L: at most sqrt(min(L, d) / L). It
  approximates the nuclear norm, which it equals where the columns are orthogonal.

All depend on L, so every text is cut to one length. A model that collapses lowers them too: a low value is not a good
sign by itself; read it together with the perplexity and the parent's value. A text whose tokens all have one state, or
whose states are not finite, has no spectrum; it is dropped, and counted in `dropped`.
"""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING

import numpy as np

from coppice import uncertainty
from coppice.data.windows import Windows
from coppice.errors import UserError
from coppice.evaluation import intervals
from coppice.evaluation.batching import sequences_at_once
from coppice.lazy import torch
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

BATCH = 16  # texts at once: fixed, as sums of floats depend on it


def measure(
    model: PreTrainedModel, windows: Windows, protocol: str, *, length: int, most: int, seed: int = 0
) -> list[Json]:
    """Rows of metrics of `model` over the first `length` tokens of the first `most` windows that have as many.

    The randomly initialised model is drawn from `seed`. Raises UserError where no window is long enough.
    """
    tokens = texts(windows, length, most)
    if not len(tokens):
        raise UserError(
            f"No window of the protocol {protocol!r} has {length} tokens; shorten the `length` of `intrinsic`, or fill "
            "windows with several documents (`pack: true`)."
        )
    states, untrained = hidden_states(model, tokens), hidden_states(randomly_initialize(model, seed), tokens)
    kept = has_spectrum(states) & has_spectrum(untrained)
    rows = normalize(states[kept])
    entropy = matrix_entropy(rows)
    rank = entropy.exp()
    values_and_units = {
        "matrix_entropy": (entropy / log(states.shape[2]), "ratio"),
        "effective_rank": (rank, "dimensions"),
        "diff_effective_rank": (matrix_entropy(normalize(untrained[kept])).exp() - rank, "dimensions"),
        "matrix_nuclear_norm": (matrix_nuclear_norm(rows), "norm/token"),
    }
    details: Json = {"task": protocol, "length": length, "dropped": int((~kept).sum())}
    return [
        {"metric": f"{name}_{protocol}", **mean(values.numpy()), "unit": unit, **details}
        for name, (values, unit) in values_and_units.items()
    ]


def texts(windows: Windows, length: int, most: int) -> Tensor:
    """[texts, length] the first tokens of the windows without padding there; at most so many windows."""
    long_enough = (windows.documents[:, :length] >= 0).all(axis=1)
    return torch.as_tensor(windows.tokens[long_enough][:most, :length]).long()


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """[texts, L, d] float64 on the CPU: the states after the decoder's last norm."""
    decoder = model.model
    with torch.inference_mode():
        states = [
            decoder(input_ids=part.to(model.device), use_cache=False).last_hidden_state.cpu().double()
            for part in tokens.split(sequences_at_once(model, BATCH))
        ]
    return torch.cat(states)


def randomly_initialize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same config with the weights that its architecture starts training from.

    Drawn on the CPU in float32, so that devices agree, and then moved to where `model` is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(model.config)
    return fresh.to(model.device, model.dtype).eval()


def has_spectrum(states: Tensor) -> Tensor:
    """[texts] bool: whether all states are finite and none is their mean, which has no direction."""
    spread = (states - states.mean(dim=-2, keepdim=True)).norm(dim=-1)
    return ((spread > 0) & spread.isfinite()).all(dim=-1)


def normalize(states: Tensor) -> Tensor:
    """R [..., L, d]: states less their mean over the tokens, each scaled to unit length."""
    return torch.nn.functional.normalize(states - states.mean(dim=-2, keepdim=True), dim=-1, eps=0)


def matrix_entropy(rows: Tensor) -> Tensor:
    """[...] H in nats of R [..., L, d], from the Gram matrix of whichever side is shorter: the spectrum is the same."""
    gram = rows @ rows.mT if rows.shape[-2] < rows.shape[-1] else rows.mT @ rows
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    return torch.special.entr(values / values.sum(dim=-1, keepdim=True)).sum(dim=-1)


def matrix_nuclear_norm(rows: Tensor) -> Tensor:
    """[...] of R [..., L, d]: the sum of the min(L, d) largest lengths of its columns, by L."""
    length, width = rows.shape[-2:]
    return rows.norm(dim=-2).topk(min(length, width), dim=-1).values.sum(dim=-1) / length


def mean(values: np.ndarray) -> Json:
    """value, stderr (None for fewer than two texts), interval and n of a metric over texts; NaN without texts."""
    value = float(values.mean()) if len(values) else float("nan")
    stderr = uncertainty.mean_stderr(values) if len(values) > 1 else None
    [ends] = intervals.of_means(values[:, None])
    return {"value": value, "stderr": stderr, **ends, "n": len(values)}
