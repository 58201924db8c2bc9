"""Checkpoints, windows and statistics of tiny models, on disk, for tests of the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from manifests import provenance
from tiny import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from coppice.calibration.stage import calibrate
from coppice.compression.stage import compress
from coppice.data.windows import tokenize
from coppice.models.checkpoint import save_checkpoint

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = [f"w{index}" for index in range(len(SPECIAL), VOCABULARY)]


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of one token a word, with ids 0 to `VOCABULARY` - 1."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def save_root(
    folder: Path, model: PreTrainedModel | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A root's checkpoint in `folder`, of `tiny_model(**changes)` when no model is given."""
    tokenizer = folder.with_name(f"{folder.name}-tokenizer")
    save_tokenizer(tokenizer)
    save_checkpoint(model or tiny_model(**changes), folder, tokenizer, provenance(), dtype)
    return folder


def save_text(path: Path, documents: int = 40, words: int = 30) -> dict[str, Any]:
    """A text of random words, as a study would name it."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(len(WORDS), (documents, words), generator=generator).tolist()
    path.write_text("\n\n".join(" ".join(WORDS[index] for index in row) for row in drawn) + "\n", encoding="utf-8")
    return {"path": str(path), "splits": {"calibration": 0.5, "recovery": 0.3, "evaluation": 0.2}}


def save_windows(
    folder: Path, root: Path, role: str = "calibration", length: int = 16, documents: int = 40, **options: Any
) -> Path:
    """All windows of `save_text` for a role, packed with the root's tokenizer."""
    from coppice.data.windows import save_windows as write

    write(tokenize(root, save_text(folder.with_suffix(".txt"), documents), role, 0, length, **options), folder)
    return folder


def gather(root: Path, windows: Path, kind: str, folder: Path) -> Path:
    """Statistics of one kind."""
    calibrate(root, windows, kind, folder, "cpu")
    return folder


def make(folder: Path, parent: Path, method: str, statistics: list[Path] | None = None, **options: Any) -> Path:
    """A node made by one compression step; `tokens` and `reference` may be among the options' names."""
    inputs = {name: options.pop(name) for name in ("tokens", "reference") if name in options}
    step = {"name": method, "method": method, "options": options}
    compress(f"tiny/{folder.name}", parent, step, folder, statistics or [], **inputs)
    return folder
