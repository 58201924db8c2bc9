from __future__ import annotations

from coppice.records.node_name import NodeName


def test_what_a_name_says() -> None:
    name = NodeName("medium/width-50/full@1/rtn-4@1")
    assert (name.model, name.parent, name.step, name.seed) == ("medium", "medium/width-50/full@1", "rtn-4", 1)
    assert name.parts == ("width-50", "full@1", "rtn-4@1")
    assert name.steps == ("width-50", "full", "rtn-4")
    assert (name.recipe, name.depth) == ("width-50/full@1/rtn-4@1", 3)
    assert name.with_study_seed == "medium/width-50/full/rtn-4"
    assert name.parent.parent == "medium/width-50"
    assert name.parent.parent.seed is None


def test_a_dense_model_has_no_parent_step_or_seed() -> None:
    name = NodeName("medium")
    assert (name.model, name.parent, name.step, name.seed) == ("medium", None, None, None)
    assert (name.parts, name.recipe, name.depth) == ((), "", 0)


def test_children_lie_below_their_parents_alone() -> None:
    assert NodeName("small").child("full@1") == "small/full@1"
    assert NodeName("small/full").is_below("small")
    assert not NodeName("small/full-2").is_below("small/full")
    assert not NodeName("small").is_below("small")


def test_a_lineage_begins_with_the_dense_model() -> None:
    name = NodeName("medium/width-50/full@1")
    assert name.lineage == ("medium", "medium/width-50", "medium/width-50/full@1")
    assert [each.last_part for each in name.lineage] == ["medium", "width-50", "full@1"]
