"""Windows of tokens: packing, fingerprints, files."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from text_files import WORDS, jsonl, source

from coppice.data.windows import assert_disjoint, load_windows, save_windows, tokenize
from coppice.errors import UserError


def test_packing_joins_documents_after_one_beginning_token_and_drops_the_rest(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4", "w5 w6 w7"])
    windows = tokenize(checkpoint, source(path), "evaluation", None, 4)
    assert windows.tokens.tolist() == [[1, 3, 4, 5], [6, 1, 7, 1]]
    assert windows.documents.tolist() == [[0, 0, 0, 0], [0, 1, 1, 2]]
    assert windows.manifest.tokens_read == 11
    assert windows.manifest.tokens == 8
    assert windows.manifest.documents == len(windows.document_hashes) == 3
    without = tokenize(checkpoint, source(path), "evaluation", None, 4, bos=False)
    assert without.tokens.tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_without_packing_each_document_has_a_window(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4"])
    windows = tokenize(checkpoint, source(path), "evaluation", 2, 4, pack=False)
    assert windows.tokens.tolist() == [[1, 3, 4, 5], [1, 7, 0, 0]]
    assert windows.documents.tolist() == [[0, 0, 0, 0], [1, 1, -1, -1]]
    assert windows.manifest.tokens == 6


def test_too_few_windows_are_counted(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4", "w5 w6 w7"])
    with pytest.raises(UserError, match="has 2 windows of 4 tokens for the role 'evaluation', but 3 are requested"):
        tokenize(checkpoint, source(path), "evaluation", 3, 4)
    with pytest.raises(UserError, match="has 3 windows of 9 tokens"):
        tokenize(checkpoint, source(path), "evaluation", 4, 9, pack=False)
    with pytest.raises(UserError, match="has 0 windows of 12 tokens"):
        tokenize(checkpoint, source(path), "evaluation", None, 12)


def test_the_fingerprint_follows_what_decides_the_tokens(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4", "w5 w6 w7"])

    def fingerprint(windows=1, length=4, **options):
        return tokenize(checkpoint, source(path), "evaluation", windows, length, **options).manifest.fingerprint

    others = [fingerprint(2), fingerprint(1, 3), fingerprint(pack=False), fingerprint(bos=False), fingerprint(seed=1)]
    assert len({fingerprint(), *others}) == 6
    first = fingerprint()
    jsonl(path, ["w0 w1 w2 w3", "w4", "something that is not read"])
    assert fingerprint() == first
    jsonl(path, ["w0 w1 w2 w8", "w4", "w5 w6 w7"])
    assert fingerprint() != first


def test_windows_are_stored_and_read_again(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4", "w5 w6 w7"])
    windows = tokenize(checkpoint, source(path), "evaluation", None, 4)
    folder = tmp_path / "tokens"
    save_windows(windows, folder)
    again = load_windows(folder)
    assert again.manifest.files.keys() == {"tokens.safetensors"}
    assert again.manifest.model_copy(update={"files": {}}) == windows.manifest
    for name in ("tokens", "documents", "document_hashes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(windows, name))
    (folder / "tokens.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="recompute the tokens"):
        load_windows(folder)


def test_texts_that_share_a_document_are_refused(tmp_path, checkpoint):
    long = [" ".join(WORDS[i : i + 30]) for i in range(4)]
    first = tokenize(checkpoint, source(jsonl(tmp_path / "a.jsonl", [*long[:2], "w1"])), "evaluation", None, 8)
    second = tokenize(
        checkpoint, source(jsonl(tmp_path / "b.jsonl", ["w1", *long[2:]]), "recovery"), "recovery", None, 8
    )
    third = tokenize(checkpoint, source(jsonl(tmp_path / "c.jsonl", long[1:])), "evaluation", None, 8)
    assert_disjoint(first, second)
    with pytest.raises(UserError, match="1 documents lie in both texts, evaluation and evaluation"):
        assert_disjoint(first, third)


def test_tokenizing_imports_neither_torch_nor_transformers(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3"])
    program = (
        "import sys; from coppice.data.windows import save_windows, tokenize\n"
        f"save_windows(tokenize({str(checkpoint)!r}, {source(path)!r}, 'evaluation', 1, 4), sys.argv[1])\n"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "tokens")], check=True)


def test_stories_have_the_reference_number_of_tokens(shared_data):
    stories = shared_data / "text_tinystories_val"
    windows = tokenize(
        shared_data / "stories260K" / "hf", source(stories / "validation.jsonl"), "evaluation", None, 512
    )
    assert windows.tokens.shape == (146, 512)
    assert windows.manifest.tokens_read == 75_084
    assert windows.manifest.documents == 165
