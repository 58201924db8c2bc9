from __future__ import annotations

from pathlib import Path

import pytest
from text_files import WORDS, write_json
from tokenizers import Tokenizer, models, pre_tokenizers, processors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A word-level tokenizer of 43 tokens that adds `<s>` (1) itself, and a model of as many embeddings."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(3)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": {"content": "<s>"}})
    write_json(folder / "config.json", {"vocab_size": 43})
    return folder
