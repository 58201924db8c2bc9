"""How alike the input and the output of each block are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from coppice.calibration.walk import embed, run_block
from coppice.models.architectures.base import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _last(kept: Tensor) -> Tensor:
    """[w, 1] the position of the last token of each window."""
    places = torch.arange(kept.shape[1])
    return torch.where(kept, places, 0).amax(dim=1, keepdim=True)


@torch.no_grad()
def gather(
    model: PreTrainedModel, tokens: Tensor, kept: Tensor, device: str, output: Path
) -> dict[str, dict[str, str]]:
    """Writes how alike a block's input and output are.

    `similarity` [blocks]: the mean over tokens of their cosine; `angular_distance` [blocks]: the mean over windows of
    arccos(cosine) / pi at the last token.
    """
    batches = embed(model, tokens, kept)
    similarity, distance = [], []
    for index, block in enumerate(blocks(model)):
        block.to(device)
        total = angle = 0.0
        for batch in batches:
            hidden = run_block(model, index, batch, device)
            cosine = nn.functional.cosine_similarity(batch.hidden.double(), hidden.double(), dim=-1)
            total += cosine[batch.kept].sum().item()
            angle += torch.arccos(cosine.gather(1, _last(batch.kept)).clamp(-1, 1)).sum().item() / torch.pi
            batch.hidden = hidden
        similarity.append(total / int(kept.sum()))
        distance.append(angle / len(tokens))
        block.to("cpu")
    similarities = {"similarity": similarity, "angular_distance": distance}
    save_file(
        {name: torch.tensor(values, dtype=torch.float64) for name, values in similarities.items()},
        output / "blocks.safetensors",
    )
    return {}
