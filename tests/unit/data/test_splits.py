"""Roles have disjoint parts of a text."""

from __future__ import annotations

from itertools import islice

import pytest
from text_files import jsonl

from coppice.data.splits import ROLES, documents
from coppice.data.windows import tokenize
from coppice.errors import UserError


def test_splits_are_disjoint_in_content_and_cover_the_documents_in_order(tmp_path):
    texts = [f"document {i % 70}" for i in range(100)]
    path = jsonl(tmp_path / "text.jsonl", texts)
    # The order in which the roles are written does not matter.
    given = {"path": str(path), "splits": {"evaluation": 0.2, "recovery": 0.7, "calibration": 0.1}}
    parts = {role: list(documents(given, role)) for role in given["splits"]}
    assert parts["calibration"] + parts["recovery"] + parts["evaluation"] == texts[:70]
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
        assert list(documents(given, "evaluation")) == ["j"]
    else:
        with pytest.raises(UserError, match=message):
            list(documents(given, "evaluation"))


def test_the_built_in_stream_differs_by_role_and_seed_and_is_endless(checkpoint):
    given = {"builtin": "biographies", "people": 20}
    roles = {role: list(islice(documents(given, role), 60)) for role in ("train", *ROLES)}
    assert sum(map(len, roles.values())) == len(set().union(*roles.values()))
    assert roles["recovery"] == list(islice(documents(given, "recovery"), 60))
    assert roles["recovery"] != list(islice(documents(given, "recovery", seed=1), 60))
    with pytest.raises(UserError, match="is endless"):
        tokenize(checkpoint, given, "recovery", None, 8)
    with pytest.raises(UserError, match="have no key 'peeple'"):
        list(documents({"builtin": "biographies", "peeple": 20}, "recovery"))
    with pytest.raises(UserError, match="'poems' is not a built-in text"):
        list(documents({"builtin": "poems"}, "recovery"))
    with pytest.raises(UserError, match="people is 0"):
        list(documents({"builtin": "biographies", "people": 0}, "recovery"))
