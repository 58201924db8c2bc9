"""How many sequences go through a model at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sequences_at_once(model: PreTrainedModel, usual: int) -> int:
    """`usual`, or 1 for a model that compresses its keys and values.

    Compression works on stretches of tokens in which padding counts, so that a sequence's scores would depend on those
    next to it.
    """
    return 1 if hasattr(model.model, "cache_settings") else usual
