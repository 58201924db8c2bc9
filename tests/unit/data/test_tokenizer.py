"""A checkpoint's tokenizer, against its model and against windows."""

from __future__ import annotations

import pytest
from text_files import jsonl, source, write_json

from coppice.data.tokenizer import check_tokenizer, load_tokenizer
from coppice.data.windows import tokenize
from coppice.errors import UserError


def test_windows_of_another_tokenizer_are_refused(tmp_path, checkpoint):
    windows = tokenize(checkpoint, source(jsonl(tmp_path / "text.jsonl", ["w0 w1"])), "evaluation", 1, 2)
    check_tokenizer(checkpoint, windows)
    (checkpoint / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="with another tokenizer"):
        check_tokenizer(checkpoint, windows)


def test_tokenizer_and_model_must_agree(checkpoint):
    write_json(checkpoint / "config.json", {"vocab_size": 42})
    with pytest.raises(UserError, match="largest token is 42, but the model has embeddings for 42"):
        load_tokenizer(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_tokenizer(checkpoint)


def test_the_beginning_token_falls_back_on_the_model(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1"])
    write_json(checkpoint / "tokenizer_config.json", {"bos_token": None})
    write_json(checkpoint / "config.json", {"vocab_size": 43, "bos_token_id": 2})
    assert tokenize(checkpoint, source(path), "evaluation", 1, 3).tokens.tolist() == [[2, 3, 4]]
    write_json(checkpoint / "config.json", {"vocab_size": 43})
    with pytest.raises(UserError, match="names a beginning-of-sequence token"):
        tokenize(checkpoint, source(path), "evaluation", 1, 3)
