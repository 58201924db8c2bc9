from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from coppice.data import text
from coppice.errors import UserError

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture
def checkpoint(tmp_path):
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


def write_json(path, value):
    path.write_text(json.dumps(value))


def jsonl(path, documents, field="text"):
    path.write_text("".join(json.dumps({field: document}) + "\n" for document in documents))
    return path


def source(path, role="evaluation", **keys):
    return {"path": str(path), "splits": {role: 1}, **keys}


def read(path, **keys):
    return list(text.documents(source(path, **keys), "evaluation"))


def test_text_files_are_cut_at_blank_lines_at_every_line_or_not(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n \n\nthree\n")
    assert read(path) == ["one\ntwo", "three"]
    assert read(path, document="line") == ["one", "two", "three"]
    assert read(path, document="file") == ["one\ntwo\n \n\nthree\n"]


def test_parquet_and_jsonl_give_the_same_documents(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", "b c"]}), tmp_path / "text.parquet")
    jsonl(tmp_path / "text.jsonl", ["a", "b c"], "body")
    assert read(tmp_path / "text.parquet", field="body") == read(tmp_path / "text.jsonl", field="body") == ["a", "b c"]


def test_only_the_first_documents_are_kept_when_their_number_is_given(tmp_path):
    assert read(jsonl(tmp_path / "text.jsonl", "abcd"), documents=2) == ["a", "b"]


def test_splits_are_disjoint_in_content_and_cover_the_documents_in_order(tmp_path):
    documents = [f"document {i % 70}" for i in range(100)]
    path = jsonl(tmp_path / "text.jsonl", documents)
    # The order in which the roles are written does not matter.
    given = {"path": str(path), "splits": {"evaluation": 0.2, "recovery": 0.7, "calibration": 0.1}}
    parts = {role: list(text.documents(given, role)) for role in given["splits"]}
    assert parts["calibration"] + parts["recovery"] + parts["evaluation"] == documents[:70]
    assert [len(part) for part in parts.values()] == [14, 49, 7]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "no share for the role 'evaluation'"),
        ({"recovery": 1}, "no share for the role 'evaluation'"),
        ({"evaluation": 0.6, "recovery": 0.6}, "add up to 1.2"),
        ({"evaluation": 0}, "the share 0;"),
        ({"evaluation": 0.5, "test": 0.5}, "a split 'test'"),
        ({"recovery": 0.9, "evaluation": 0.1}, None),
        ({"evaluation": 0.01}, "too few"),
    ],
)
def test_splits_are_checked(tmp_path, splits, message):
    given = {"path": str(jsonl(tmp_path / "text.jsonl", "abcdefghij")), "splits": splits}
    if message is None:
        assert list(text.documents(given, "evaluation")) == ["j"]
    else:
        with pytest.raises(UserError, match=message):
            list(text.documents(given, "evaluation"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"text\.jsonl, line 2: there is no key 'text' among body"),
        ("text.jsonl", b'{"text": "a"}\n\n{"text": \n', r"text\.jsonl, line 3: not valid JSON"),
        ("text.jsonl", b'{"text": 3}\n', r"line 1: 'text' holds int"),
        ("text.jsonl", b'["a"]\n', r"line 1: a JSON object is expected"),
        ("text.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"text\.jsonl, line 2: not UTF-8"),
        ("text.txt", b"a\n\n\xff\n", r"text\.txt, line 3: not UTF-8"),
        ("text.txt", b"\n \n", "holds no documents"),
        ("text.jsonl", b"", "holds no documents"),
        ("text.parquet", b"nothing", r"text\.parquet is not a Parquet file"),
        ("text.csv", b"a", "has the suffix '.csv'"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_missing_sources_are_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"no column 'text'; it has body"):
        read(tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"missing\.txt does not exist"):
        read(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="is not a file"):
        read(tmp_path)
    with pytest.raises(UserError, match="needs one of the keys"):
        list(text.documents({"splits": {"evaluation": 1}}, "evaluation"))


def test_a_dataset_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    given = {"dataset": "org/corpus", "splits": {"evaluation": 1}}
    with pytest.raises(UserError, match="needs a pinned `revision`"):
        list(text.documents(given, "evaluation"))
    with pytest.raises(UserError, match="org/corpus at revision abc could not be read") as caught:
        list(text.documents({**given, "revision": "abc"}, "evaluation"))
    assert "\n" not in str(caught.value)


def test_a_dataset_is_streamed_when_the_number_of_documents_is_given(monkeypatch):
    import datasets

    asked = []

    def load(name, configuration, **options):
        asked.append((name, configuration, options))
        return ({"body": f"document {i}"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load)
    given = {"dataset": "org/corpus", "name": "en", "revision": "abc", "split": "test", "field": "body", "documents": 4}
    found = list(text.documents({**given, "splits": {"calibration": 0.5, "evaluation": 0.5}}, "evaluation"))
    assert found == ["document 2", "document 3"]
    assert asked == [("org/corpus", "en", {"split": "test", "revision": "abc", "streaming": True})]


def test_packing_joins_documents_after_one_beginning_token_and_drops_the_rest(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4", "w5 w6 w7"])
    windows = text.tokenize(checkpoint, source(path), "evaluation", None, 4)
    assert windows.tokens.tolist() == [[1, 3, 4, 5], [6, 1, 7, 1]]
    assert windows.documents.tolist() == [[0, 0, 0, 0], [0, 1, 1, 2]]
    assert windows.manifest.tokens_read == 11
    assert windows.manifest.tokens == 8
    assert windows.manifest.documents == len(windows.document_hashes) == 3
    without = text.tokenize(checkpoint, source(path), "evaluation", None, 4, bos=False)
    assert without.tokens.tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_without_packing_each_document_has_a_window(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4"])
    windows = text.tokenize(checkpoint, source(path), "evaluation", 2, 4, pack=False)
    assert windows.tokens.tolist() == [[1, 3, 4, 5], [1, 7, 0, 0]]
    assert windows.documents.tolist() == [[0, 0, 0, 0], [1, 1, -1, -1]]
    assert windows.manifest.tokens == 6


def test_too_few_windows_are_counted(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4", "w5 w6 w7"])
    with pytest.raises(UserError, match="has 2 windows of 4 tokens for the role 'evaluation', but 3 are asked"):
        text.tokenize(checkpoint, source(path), "evaluation", 3, 4)
    with pytest.raises(UserError, match="has 3 windows of 9 tokens"):
        text.tokenize(checkpoint, source(path), "evaluation", 4, 9, pack=False)
    with pytest.raises(UserError, match="has 0 windows of 12 tokens"):
        text.tokenize(checkpoint, source(path), "evaluation", None, 12)


def test_the_fingerprint_follows_what_decides_the_tokens(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4", "w5 w6 w7"])

    def fingerprint(windows=1, length=4, **options):
        return text.tokenize(checkpoint, source(path), "evaluation", windows, length, **options).manifest.fingerprint

    others = [fingerprint(2), fingerprint(1, 3), fingerprint(pack=False), fingerprint(bos=False), fingerprint(seed=1)]
    assert len({fingerprint(), *others}) == 6
    first = fingerprint()
    jsonl(path, ["w0 w1 w2 w3", "w4", "something that is not read"])
    assert fingerprint() == first
    jsonl(path, ["w0 w1 w2 w8", "w4", "w5 w6 w7"])
    assert fingerprint() != first


def test_windows_of_another_tokenizer_are_refused(tmp_path, checkpoint):
    windows = text.tokenize(checkpoint, source(jsonl(tmp_path / "text.jsonl", ["w0 w1"])), "evaluation", 1, 2)
    text.check_tokenizer(checkpoint, windows)
    (checkpoint / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="with another tokenizer"):
        text.check_tokenizer(checkpoint, windows)


def test_tokenizer_and_model_must_agree(checkpoint):
    write_json(checkpoint / "config.json", {"vocab_size": 42})
    with pytest.raises(UserError, match="largest token is 42, but the model has embeddings for 42"):
        text.load_tokenizer(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        text.load_tokenizer(checkpoint)


def test_the_beginning_token_falls_back_on_the_model(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1"])
    write_json(checkpoint / "tokenizer_config.json", {"bos_token": None})
    write_json(checkpoint / "config.json", {"vocab_size": 43, "bos_token_id": 2})
    assert text.tokenize(checkpoint, source(path), "evaluation", 1, 3).tokens.tolist() == [[2, 3, 4]]
    write_json(checkpoint / "config.json", {"vocab_size": 43})
    with pytest.raises(UserError, match="names a beginning-of-sequence token"):
        text.tokenize(checkpoint, source(path), "evaluation", 1, 3)


def test_windows_are_stored_and_read_again(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4", "w5 w6 w7"])
    windows = text.tokenize(checkpoint, source(path), "evaluation", None, 4)
    folder = tmp_path / "tokens"
    text.save_windows(windows, folder)
    again = text.load_windows(folder)
    assert again.manifest.files.keys() == {"tokens.safetensors"}
    assert again.manifest.model_copy(update={"files": {}}) == windows.manifest
    for name in ("tokens", "documents", "document_hashes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(windows, name))
    (folder / "tokens.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="make the tokens anew"):
        text.load_windows(folder)


def test_texts_that_share_a_document_are_refused(tmp_path, checkpoint):
    long = [" ".join(WORDS[i : i + 30]) for i in range(4)]
    first = text.tokenize(checkpoint, source(jsonl(tmp_path / "a.jsonl", [*long[:2], "w1"])), "evaluation", None, 8)
    second = text.tokenize(
        checkpoint, source(jsonl(tmp_path / "b.jsonl", ["w1", *long[2:]]), "recovery"), "recovery", None, 8
    )
    third = text.tokenize(checkpoint, source(jsonl(tmp_path / "c.jsonl", long[1:])), "evaluation", None, 8)
    text.assert_disjoint(first, second)
    with pytest.raises(UserError, match="1 documents lie in both texts, evaluation and evaluation"):
        text.assert_disjoint(first, third)


def test_the_built_in_stream_differs_by_role_and_seed_and_has_no_end(checkpoint):
    given = {"builtin": "biographies", "people": 20}
    roles = {role: list(islice(text.documents(given, role), 60)) for role in ("train", *text.ROLES)}
    assert sum(map(len, roles.values())) == len(set().union(*roles.values()))
    assert roles["recovery"] == list(islice(text.documents(given, "recovery"), 60))
    assert roles["recovery"] != list(islice(text.documents(given, "recovery", seed=1), 60))
    with pytest.raises(UserError, match="has no end"):
        text.tokenize(checkpoint, given, "recovery", None, 8)
    with pytest.raises(UserError, match="have no key 'peeple'"):
        list(text.documents({"builtin": "biographies", "peeple": 20}, "recovery"))
    with pytest.raises(UserError, match="no built-in text 'poems'"):
        list(text.documents({"builtin": "poems"}, "recovery"))
    with pytest.raises(UserError, match="people is 0"):
        list(text.documents({"builtin": "biographies", "people": 0}, "recovery"))


def test_tokenizing_imports_neither_torch_nor_transformers(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3"])
    program = (
        "import sys; from coppice import text\n"
        f"text.save_windows(text.tokenize({str(checkpoint)!r}, {source(path)!r}, 'evaluation', 1, 4), sys.argv[1])\n"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "tokens")], check=True)


def test_the_stage_writes_what_its_arguments_say(tmp_path, checkpoint):
    import argparse

    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4"])
    parser = argparse.ArgumentParser()
    text.add_arguments(parser)
    given = json.dumps(source(path))
    command = f"--tokenizer {checkpoint} --role evaluation --windows 2 --length 3 --no-pack --no-bos --output".split()
    text.run(parser.parse_args([*command, str(tmp_path / "tokens"), "--text", given]))
    assert text.load_windows(tmp_path / "tokens").tokens.tolist() == [[3, 4, 5], [7, 0, 0]]


def test_stories_have_the_reference_number_of_tokens(shared_data):
    stories = shared_data / "text_tinystories_val"
    windows = text.tokenize(
        shared_data / "stories260K" / "hf", source(stories / "validation.jsonl"), "evaluation", None, 512
    )
    assert windows.tokens.shape == (146, 512)
    assert windows.manifest.tokens_read == 75_084
    assert windows.manifest.documents == 165
