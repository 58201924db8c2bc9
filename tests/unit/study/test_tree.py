"""The tree: nodes and their names, marks and refusals, and what each node needs."""

from __future__ import annotations

import pytest
from studies import small_study, tiny_folder

from coppice.errors import UserError
from coppice.methods.registry import method
from coppice.study import tree
from coppice.study.loading import load_study


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path)


def study(**changes):
    return load_study({**small_study(), **changes})


def recipes(*entries):
    return study(recipes=list(entries))


def refusal(*steps: str) -> str:
    with pytest.raises(UserError) as error:
        recipes(list(steps))
    return str(error.value)


def test_recipes_that_begin_alike_share_nodes():
    assert list(tree.nodes(recipes(["wanda-50", "rtn-4"], ["wanda-50", "full-5k"]))) == [
        "tiny",
        "tiny/wanda-50",
        "tiny/wanda-50/rtn-4",
        "tiny/wanda-50/full-5k",
    ]


def test_parents_come_before_children():
    seen = set()
    for node in tree.nodes(study()).values():
        assert node.parent is None or node.parent in seen
        seen.add(node.name)


def test_seeds_are_borne_from_the_first_step_that_recovers_on():
    found = tree.nodes(recipes({"steps": ["wanda-50", "full-5k", "rtn-4"], "seeds": [0, 1]}))
    assert list(found)[1:] == [
        "tiny/wanda-50",
        "tiny/wanda-50/full-5k",
        "tiny/wanda-50/full-5k/rtn-4",
        "tiny/wanda-50/full-5k@1",
        "tiny/wanda-50/full-5k@1/rtn-4@1",
    ]
    last = found["tiny/wanda-50/full-5k@1/rtn-4@1"]
    assert last == tree.StepNode(last.name, "tiny", "tiny/wanda-50/full-5k@1", "rtn-4", 1)
    assert found["tiny/wanda-50"].seed == 0


def test_the_studys_own_seed_is_not_borne():
    found = tree.nodes(study(seed=3, recipes=[{"steps": ["full-5k"], "seeds": [0, 3]}]))
    assert {name: node.seed for name, node in found.items()} == {"tiny": 3, "tiny/full-5k@0": 0, "tiny/full-5k": 3}


def test_products_leave_nulls_out_and_models_are_chosen():
    models = {"tiny": {"path": "tiny"}, "other": {"path": "tiny"}}
    found = tree.nodes(
        study(models=models, recipes=[{"models": ["other"], "product": [["wanda-50", None], ["rtn-4", None]]}])
    )
    assert list(found) == ["tiny", "other", "other/wanda-50", "other/wanda-50/rtn-4", "other/rtn-4"]


def test_marks_gather_along_the_path_and_outlive_recovery():
    assert tree.traits(study(), "tiny/wanda-50/full-5k/rtn-4/eora-2") == {"masked", "quantized", "compensated"}
    assert tree.traits(study(), "tiny") == frozenset()


def test_a_method_may_say_itself_which_marks_it_leaves():
    lora = method("lora")
    options = lora.options(text="a", validation="a", tokens=1)
    assert lora.traits(frozenset({"masked"}), options) == {"masked", "compensated"}
    assert lora.traits(frozenset({"smaller"}), options) == {"smaller"}


def test_a_step_that_its_parent_makes_impossible_is_refused():
    sentence = refusal("rtn-4", "wanda-50")
    assert sentence.startswith("The study: recipes.0 (rtn-4 > wanda-50): the step 'wanda-50' (wanda) cannot work on a")
    assert "quantized model, because " in sentence
    assert "because because" not in sentence


def test_an_impossible_step_is_told_once_for_all_models_and_seeds():
    models = {"tiny": {"path": "tiny"}, "other": {"path": "tiny"}}
    with pytest.raises(UserError) as error:
        study(models=models, recipes=[{"steps": ["rtn-4", "full-5k"], "seeds": [0, 1]}])
    assert len(str(error.value).splitlines()) == 1


def test_the_same_step_twice_in_a_row_is_refused():
    assert "the step 'wanda-50' appears twice in a row; write it once." in refusal("wanda-50", "wanda-50")
    assert len(tree.nodes(recipes(["wanda-50", "full-5k", "wanda-50"]))) == 4


@pytest.mark.parametrize("before", [[], ["shortgpt-1"], ["wanda-50", "full-5k"]])
def test_a_compensation_needs_something_to_compensate(before):
    assert "the step 'eora-2' (eora) has nothing to compensate" in refusal(*before, "eora-2")


@pytest.mark.parametrize(
    ("parent", "reference"),
    [
        ("tiny/wanda-50", "tiny"),
        ("tiny/wanda-50/rtn-4", "tiny"),
        ("tiny/shortgpt-1/rtn-4", "tiny/shortgpt-1"),
        ("tiny/wanda-50/full-5k@1/rtn-4@1", "tiny/wanda-50/full-5k@1"),
        ("tiny/full-5k", "tiny/full-5k"),
        ("tiny/rtn-4/eora-2", "tiny/rtn-4/eora-2"),
    ],
)
def test_the_reference_stands_before_the_last_run_of_compressions(parent, reference):
    assert tree.reference(study(), parent) == reference


def test_statistics_and_calibrations_of_steps():
    found = study()
    assert (tree.kinds(found, "wanda-50"), tree.calibration(found, "wanda-50")) == (["moments"], "default")
    assert (tree.kinds(found, "shortgpt-1"), tree.calibration(found, "rtn-4")) == (["blocks"], None)
    assert (tree.kinds(found, "gptq-4"), tree.reads_windows(found.steps["gptq-4"])) == ([], True)
    assert not tree.reads_windows(found.steps["rtn-4"])


def test_a_method_without_moments_does_not_propagate():
    steps = {**small_study()["steps"], "rtn-4": {"method": "rtn", "bits": 4, "sequential": True}}
    assert not tree.reads_windows(study(steps=steps).steps["rtn-4"])


def test_options_add_to_what_a_step_reads():
    steps = small_study()["steps"]
    refitted = {"method": "magnitude", "sparsity": 0.5, "refit": True}
    searched = {"method": "asvd", "keep": 0.5, "search": "strs"}
    spread = {"method": "gptq", "bits": 4, "sequential": True, "allocation": {"by": "knapsack"}}
    found = study(steps={**steps, "magnitude-50": refitted, "asvd-50": searched, "gptq-mixed": spread})
    assert tree.kinds(found, "magnitude-50") == ["moments"]
    assert not tree.reads_windows(found.steps["magnitude-50"])
    # Budgets are spread by the parent's moments, and the sweep runs on those behind the compressed blocks.
    for step in ("asvd-50", "gptq-mixed"):
        assert tree.kinds(found, step) == ["moments"]
        assert tree.reads_windows(found.steps[step])


def test_token_uses():
    uses = tree.token_uses(study())
    assert uses["calibration.default"] == tree.TokenUse("biographies", "calibration", 4, 32, True)
    assert uses["recovery.full-5k"] == tree.TokenUse("biographies", "recovery", 157, 32, True)
    assert uses["validation.full-5k"] == tree.TokenUse("biographies", "validation", 64, 32, True)
    assert uses["evaluation.quality.own"] == tree.TokenUse("biographies", "evaluation", 4, 32, True)


def test_evaluations_of_a_node_and_their_world():
    found = study()
    assert tree.evaluations(found, "tiny") == ["quality", "cost"]
    assert tree.evaluations(found, "tiny/wanda-50") == ["quality"]
    assert tree.evaluations(found, "tiny/wanda-50/rtn-4") == ["quality", "cost"]
    assert tree.world(found, found.evaluations["quality"]) == "biographies"
    assert tree.world(found, found.evaluations["cost"]) is None


def with_basin(nodes=("*",), **changes):
    basin = {"kind": "connectivity", "perplexity": {"own": {"text": "biographies"}}, "nodes": list(nodes)}
    return study(evaluations={"basin": basin}, **changes)


def test_a_connectivity_measures_nodes_of_another_seed_that_can_be_interpolated():
    found = with_basin()
    measured = [name for name in tree.nodes(found) if tree.evaluations(found, name)]
    # Below it lies a quantized node of the same seed.
    assert measured == ["tiny/shortgpt-1/full-5k@1"]
    assert tree.token_uses(found)["evaluation.basin.own"].role == "evaluation"
    assert tree.world(found, found.evaluations["basin"]) is None


def test_a_connectivity_without_a_node_or_without_its_twin_is_refused():
    with pytest.raises(UserError, match=r"evaluations.basin: no node that matches its `nodes` was trained with"):
        with_basin(["tiny/wanda-50*"])
    lonely = {"steps": ["wanda-50", "full-5k"], "seeds": [1, 2]}
    with pytest.raises(UserError, match=r"'tiny/wanda-50/full-5k@1' has no twin 'tiny/wanda-50/full-5k' .*seed, 0, to"):
        with_basin(recipes=[lonely])
    assert with_basin(recipes=[{**lonely, "seeds": [0, 1]}])
