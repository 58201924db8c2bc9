from __future__ import annotations

import re

import pytest
from studies import small_study

from coppice.planning import patterns
from coppice.study.loading import load_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    from studies import tiny_folder

    tiny_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return load_study(small_study())


def test_an_empty_alternation_matches_nothing() -> None:
    assert not re.search(patterns.alternation([]), "") and not re.search(patterns.alternation([]), "anything")
    assert re.fullmatch(patterns.alternation(["a.b"]), "a.b") and not re.fullmatch(patterns.alternation(["a.b"]), "axb")


def test_nodes_are_models_and_steps_with_seeds(study) -> None:
    node = patterns.node(study)
    assert all(re.fullmatch(node, name) for name in ("tiny", "tiny/rtn-4", "tiny/shortgpt-1/full-5k@1/gptq-4@1"))
    assert not any(re.fullmatch(node, name) for name in ("tiny/", "other", "tiny/unknown", "tiny/rtn-4@x"))


def test_parts_are_told_by_whether_the_step_trains(study) -> None:
    assert re.fullmatch(patterns.training_part(study), "full-5k@1")
    assert not re.fullmatch(patterns.training_part(study), "rtn-4")
    assert re.fullmatch(patterns.compressing_part(study), "rtn-4@1")
    assert not re.fullmatch(patterns.compressing_part(study), "full-5k")


def test_evaluations_of_a_kind(study) -> None:
    assert re.fullmatch(patterns.evaluation(study, "cost"), "cost")
    assert not re.fullmatch(patterns.evaluation(study, "cost"), "quality")
    assert not re.search(patterns.evaluation(study, "connectivity"), "cost")
