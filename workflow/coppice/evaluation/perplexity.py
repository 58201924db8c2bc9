"""Perplexity over fixed windows of tokens.

The protocol of GPTQ and SparseGPT (Frantar et al., arXiv 2210.17323 and 2301.00774): the text is cut into windows
without overlap, each window is a sequence of its own, and every token but a window's first is scored, in float32:

    loss = - sum_i ln p(x_i | x_<i in its window) / tokens scored      [nats per token]
    perplexity = exp(loss)

What was sampled are documents, not tokens: standard errors are those of a ratio of sums over documents (see
`uncertainty.ratio_of_sums`), or over windows where there is one document only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coppice import uncertainty
from coppice.data.windows import Windows
from coppice.errors import UserError
from coppice.evaluation.batching import sequences_at_once
from coppice.lazy import torch
from coppice.records.base import Json
from coppice.records.metrics import Item

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROTOCOL_FIELDS = {"text", "role", "length", "windows", "bos", "packed", "documents"}  # of a protocol's token set
LOGITS = 1 << 26  # logits computed at once; with the shapes it decides the batch, whatever the machine


def measure(model: PreTrainedModel, windows: Windows, name: str) -> tuple[list[Json], list[Item]]:
    """Loss and perplexity of `model` by the protocol `name`: rows of metrics and of items (one a document).

    Raises UserError where the windows are longer than the model's context, or none of their tokens is scored.
    """
    length = windows.manifest.length
    context = model.config.max_position_embeddings
    if length > context:
        raise UserError(
            f"The protocol {name!r} has windows of {length} tokens, but the model's context ends at {context}; "
            "shorten them."
        )
    log_likelihoods, scored = token_log_likelihoods(model, windows)
    per_window = windows.manifest.documents < 2
    owners = np.arange(len(scored))[:, None].repeat(length - 1, axis=1) if per_window else windows.documents[:, 1:]
    tokens = np.bincount(owners[scored])
    if not tokens.any():
        raise UserError(f"The protocol {name!r} scores no token; its windows need at least two.")
    sums = np.bincount(owners[scored], weights=log_likelihoods[scored])
    scored_documents = np.flatnonzero(tokens)
    items: list[Item] = [
        {
            "task": name,
            "item": str(item),
            "choice": 0,
            "log_likelihood": float(sums[item]),
            "length": int(tokens[item]),
            "correct": None,
        }
        for item in scored_documents
    ]
    protocol: Json = {
        **windows.manifest.model_dump(include=PROTOCOL_FIELDS),
        "stride": length,
        "tokens": int(tokens.sum()),
        "tokens_fingerprint": windows.manifest.fingerprint,
        "sampled": "windows" if per_window else "documents",
    }
    return rows(name, -sums[scored_documents], tokens[scored_documents], protocol), items


def rows(name: str, losses: np.ndarray, tokens: np.ndarray, protocol: Json) -> list[Json]:
    """Metrics from the summed losses (nats) and the tokens of documents; one document alone gives no standard error."""
    loss = float(losses.sum() / tokens.sum())
    shared: Json = {"n": int(tokens.sum()), "task": name, "protocol": protocol}
    metrics: list[Json] = [
        {"metric": f"loss_{name}", "value": loss, "stderr": None, "unit": "nats/token", **shared},
        {"metric": f"perplexity_{name}", "value": float(np.exp(loss)), "stderr": None, "unit": "perplexity", **shared},
    ]
    if len(losses) > 1:
        _, stderr = uncertainty.ratio_of_sums(losses, tokens)
        low, high = uncertainty.mean_interval(loss, stderr)
        metrics[0] |= {"stderr": stderr, "low": low, "high": high}
        _, stderr, (low, high) = uncertainty.perplexity(losses, tokens)
        metrics[1] |= {"stderr": stderr, "low": low, "high": high}
    return metrics


def token_log_likelihoods(model: PreTrainedModel, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """ln p of each token but a window's first, [windows, length - 1] float64, and which of them are scored, bool.

    Padding is neither seen nor scored.
    """
    tokens = torch.as_tensor(windows.tokens).long()
    kept = torch.as_tensor(windows.documents) >= 0
    batch = sequences_at_once(model, max(1, min(16, LOGITS // (tokens.shape[1] * model.config.vocab_size))))
    batches = []
    with torch.inference_mode():
        for start in range(0, len(tokens), batch):
            part = kept[start : start + batch]
            # Padding is on the right; what all sequences have of it is not computed.
            length = int(part.sum(1).max())
            inputs = tokens[start : start + batch, :length].to(model.device)
            mask = None if part[:, :length].all() else part[:, :length].to(model.device)
            logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), inputs[:, 1:].flatten(), reduction="none"
            )
            scored = -losses.view(len(inputs), -1).cpu().double()
            batches.append(torch.nn.functional.pad(scored, (0, tokens.shape[1] - length)))
    return torch.cat(batches).numpy(), kept[:, 1:].numpy()
