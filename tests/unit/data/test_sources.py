"""Documents of files and datasets, and the sentence for each that cannot be read."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest
from text_files import jsonl, source

from coppice.data.splits import documents
from coppice.errors import UserError


def read(path, **keys):
    return list(documents(source(path, **keys), "evaluation"))


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"text\.jsonl, line 2 has no key 'text', only body"),
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
        list(documents({"splits": {"evaluation": 1}}, "evaluation"))


def test_a_dataset_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    given = {"dataset": "org/corpus", "splits": {"evaluation": 1}}
    with pytest.raises(UserError, match="needs a pinned `revision`"):
        list(documents(given, "evaluation"))
    with pytest.raises(UserError, match="org/corpus at revision abc could not be read") as caught:
        list(documents({**given, "revision": "abc"}, "evaluation"))
    assert "\n" not in str(caught.value)


def test_a_dataset_is_streamed_when_the_number_of_documents_is_given(monkeypatch):
    import datasets

    requests = []

    def load(name, configuration, **options):
        requests.append((name, configuration, options))
        return ({"body": f"document {i}"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load)
    given = {"dataset": "org/corpus", "name": "en", "revision": "abc", "split": "test", "field": "body", "documents": 4}
    read_documents = list(documents({**given, "splits": {"calibration": 0.5, "evaluation": 0.5}}, "evaluation"))
    assert read_documents == ["document 2", "document 3"]
    assert requests == [("org/corpus", "en", {"split": "test", "revision": "abc", "streaming": True})]
