"""The tokenizer of a checkpoint: loaded from its files, and checked against the model and against tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice import storage
from coppice.data.sources import describe
from coppice.errors import UserError
from coppice.files import read_json_object, sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from coppice.data.windows import Windows


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, from its tokenizer.json alone.

    Raises UserError where that is missing or broken, or holds tokens that the model has no embedding for.
    """
    from tokenizers import Tokenizer

    path = storage.ensure_local(Path(directory) / "tokenizer.json")
    if not path.is_file():
        raise UserError(
            f"{directory} has no tokenizer.json; make one with transformers: "
            f"`AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})`."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer ({error}).") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = optional_json(Path(directory) / "config.json").get("vocab_size")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if size is not None and largest >= size:
        raise UserError(
            f"Tokenizer and model of {directory} disagree: the tokenizer's largest token is {largest}, but the model "
            f"has embeddings for {size} (0 to {size - 1})."
        )
    return tokenizer


def check_tokenizer(directory: Path, windows: Windows) -> None:
    """Raises UserError where `windows` were made with another tokenizer than that of the checkpoint `directory`."""
    if sha256(storage.ensure_local(Path(directory) / "tokenizer.json")) != windows.manifest.tokenizer:
        raise UserError(
            f"{describe(windows.manifest.text)} was cut into windows with another tokenizer than that of "
            f"{directory}; recompute them with the model's own."
        )


def beginning_token(directory: Path, tokenizer: Tokenizer) -> int:
    """The token before each document: the tokenizer's beginning of sequence, else the model's.

    Raises UserError where neither names one.
    """
    entry = optional_json(Path(directory) / "tokenizer_config.json").get("bos_token")
    content = entry["content"] if isinstance(entry, dict) else entry
    if content is not None and (token := tokenizer.token_to_id(content)) is not None:
        return token
    token = optional_json(Path(directory) / "config.json").get("bos_token_id")
    if token is None:
        raise UserError(
            f"Neither tokenizer_config.json nor config.json of {directory} names a beginning-of-sequence token; "
            "set `bos: false` to do without."
        )
    return token


def optional_json(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint's JSON file; empty where the file does not exist."""
    return read_json_object(path) if storage.ensure_local(path).is_file() else {}
