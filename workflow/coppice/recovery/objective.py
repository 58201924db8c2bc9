"""The loss that is trained and the held-out loss, over windows of L tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from coppice.data.windows import Windows
from coppice.recovery import distributed

IGNORED = -100  # label of a position that is not a target


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context whose products are computed in bfloat16 where that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def summed_loss(model: nn.Module, tokens: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Negative log-likelihood of the labels in nats, summed in float32. tokens, labels: [b, L]; labels are not shifted.

    Padding follows a window's tokens and is not a target, so that causal attention needs no mask for it.
    """
    with autocast(tokens.device, precision):
        logits = model(input_ids=tokens, use_cache=False).logits
    predicted = logits[:, :-1].float().flatten(0, 1)
    return nn.functional.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def count_targets(labels: Tensor) -> int:
    """Of labels [b, L] that are not shifted: the first token of a window is predicted by none."""
    return int((labels[:, 1:] != IGNORED).sum())


class WindowData(Dataset):
    """Windows in the order given by `indices`, each with its labels."""

    def __init__(self, windows: Windows, indices: np.ndarray) -> None:
        self.windows, self.indices = windows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        index = self.indices[position]
        tokens = torch.from_numpy(self.windows.tokens[index].astype(np.int64))
        padding = torch.from_numpy(self.windows.documents[index] < 0)
        return {"input_ids": tokens, "labels": tokens.masked_fill(padding, IGNORED)}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[L] each -> [b, L]."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, windows: Windows, batch_size: int, precision: str) -> float:
    """Mean negative log-likelihood of a token in nats, over all targets of the windows.

    batch_size: windows at once on a device; several processes take turns.
    """
    device = next(model.parameters()).device
    data = WindowData(windows, np.arange(len(windows.tokens)))
    training = model.training
    model.eval()
    loss, targets = 0.0, 0
    for start in range(0, len(data), batch_size * distributed.world_size()):
        first = start + batch_size * distributed.rank()
        own = range(first, min(first + batch_size, len(data)))
        batch = collate([data[i] for i in own or [0]])
        if not own:  # all processes call the model equally often: this one's call counts for nothing
            batch["labels"].fill_(IGNORED)
        loss += summed_loss(model, batch["input_ids"].to(device), batch["labels"].to(device), precision).item()
        targets += count_targets(batch["labels"])
    model.train(training)
    total_loss, total_targets = distributed.sum_over_processes((loss, targets), device)
    return total_loss / total_targets
