"""The config: what is accepted, and the sentence for everything that is not."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from studies import small_study, tiny_folder

from coppice.errors import UserError
from coppice.methods.options import MethodOptions
from coppice.methods.registry import methods
from coppice.records import renamed
from coppice.study import loading, tree
from coppice.study.loading import effective, load_study

ROOT = Path(__file__).parents[3]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path)


def changed(place: str, value: Any = None, remove: bool = False) -> dict[str, Any]:
    """The small study with another value at a dotted place."""
    study = small_study()
    *path, last = place.split(".")
    target = study
    for key in path:
        target = target[int(key) if isinstance(target, list) else key]
    if remove:
        del target[last]
    else:
        target[last] = value
    return study


def refusal(study: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        load_study(study)
    return str(error.value)


def test_a_study_is_read_back_from_its_effective_form():
    study = load_study(small_study())
    assert load_study(effective(study)) == study
    assert effective(study)["steps"]["wanda-50"]["sequential"] is False
    assert "calibration" not in effective(study)["steps"]["rtn-4"]


def test_the_effective_study_is_yaml_that_reads_back(tmp_path):
    study = load_study(small_study())
    loading.write_effective(study, tmp_path / "study.yaml")
    assert load_study(tmp_path / "study.yaml") == study


def test_numbers_with_exponents_and_underscores(tmp_path):
    text = yaml.safe_dump(small_study())
    changes = "{tokens: 5_000, learning_rate: 1e-3, weight_decay: 1E-1}"
    (tmp_path / "study.yaml").write_text(text)
    (tmp_path / "changes.yaml").write_text(f"steps: {{full-5k: {changes}}}\nbudgets: [1e5]\n")
    command("study.yaml", "changes.yaml", "--output", "out.yaml")
    study = load_study(tmp_path / "out.yaml")
    options = study.steps["full-5k"].options
    assert (options.tokens, options.learning_rate, options.weight_decay) == (5000, 0.001, 0.1)
    assert study.budgets == [100_000]


def test_options_are_the_methods_own():
    step = load_study(small_study()).steps["gptq-4"]
    assert (step.method, step.options.bits, step.options.sequential) == ("gptq", 4, True)


REFUSED: list[tuple[dict[str, Any] | Callable[[], dict[str, Any]], str]] = [
    (changed("steps", remove=True), "recipes.0: there is no step 'wanda-50'. There are no steps yet."),
    (changed("seeed", 1), "The study: There is no key 'seeed'. Did you mean 'seed'?"),
    (changed("models", remove=True), "models is missing."),
    (changed("models", {}), "models is empty; it needs at least one entry."),
    (changed("seed", "x"), 'seed is "x"; it should be a valid integer, unable to parse string as an integer.'),
    (changed("steps", None), "steps is null; it should be a mapping of keys to values."),
    # Steps and their options
    (changed("steps.rtn-4.method", "rtm"), "steps.rtn-4: 'rtm' is not a method. Did you mean 'rtn'?"),
    (
        changed("steps.rtn-4.method", remove=True),
        "steps.rtn-4: a step needs the key 'method' with the name of a method.",
    ),
    (changed("steps.rtn-4.bit", 4), "steps.rtn-4: there is no rtn option 'bit'. Did you mean 'bits'?"),
    (changed("steps.wanda-50.sparsity", 3), "steps.wanda-50.sparsity is 3; it should be less than"),
    (changed("steps.eora-2.rank", remove=True), "steps.eora-2.rank is missing."),
    (changed("steps.rtn-4", 4), "steps.rtn-4 is 4; it should be a mapping of keys to values."),
    (changed("steps.wanda-50.calibration", "defalt"), "there is no calibration 'defalt'. Did you mean 'default'?"),
    (
        changed("steps.rtn-4.calibration", "default"),
        "steps.rtn-4.calibration: rtn with these options needs no calibration; leave the key out.",
    ),
    (
        changed("calibrations.other", {"text": "biographies"}),
        "steps.wanda-50: wanda needs a calibration; name one of the study's: default, other.",
    ),
    (changed("calibrations", {}), "steps.wanda-50: wanda needs a calibration; describe one under `calibrations`."),
    (
        changed("tracking", {"uri": "postgresql://me:a/secret@host/runs"}),
        "tracking.uri: an address with a password would appear in logs and reports; leave the password out, and set",
    ),
    # Names
    (changed("study", "a/b"), "study: 'a/b' is not a name"),
    (changed("steps.a/b", {"method": "rtn"}), "steps.a/b: 'a/b' is not a name"),
    (changed("steps.moments", {"method": "rtn"}), "steps.moments: the name 'moments' is reserved"),
    (changed("steps.Tiny", {"method": "rtn"}), "steps.Tiny: the name is taken by models.tiny"),
    (changed("calibrations.cost", {"text": "biographies"}), "evaluations.cost: the name is taken by calibrations.cost"),
    (changed("evaluations.quality.perplexity", {"a.b": {}}), "evaluations.quality.perplexity.a.b: 'a.b' is not a name"),
    (changed("models", {4: {"path": "tiny"}}), "models.4: this name is a number to YAML"),
    # Models
    (
        changed("models.tiny", {"paht": "tiny"}),
        "models.tiny: a model needs exactly one of the keys shipped, path, hub.",
    ),
    (changed("models.tiny", {"hub": "a/b"}), "models.tiny.revision is missing."),
    (
        changed("models.tiny", {"hub": "a/b", "revision": "main"}),
        "models.tiny: revision is 'main'; write the commit's 40",
    ),
    (changed("models.tiny", {"path": "there"}), "models.tiny.path: there is not a model folder: it has no config.json"),
    (changed("models.tiny", {"shipped": "huge"}), "models.tiny.shipped: there is no shipped model 'huge'."),
    # Texts
    (changed("calibrations.default.text", "bio"), "calibrations.default.text: there is no text 'bio'."),
    (changed("texts.own", {"path": "own.txt"}), "texts.own.path: own.txt does not exist"),
    (changed("texts.own", {"path": "own.doc"}), "texts.own.path: own.doc must be one of .txt, .jsonl, .parquet."),
    (changed("texts.own", {"dataset": "a/b", "revision": "v1"}), "texts.own: revision is 'v1'"),
    (
        changed("texts.own", {"path": "own.txt", "splits": {"calibration": 0.6, "recovery": 0.6}}),
        "texts.own: the shares in splits sum to 1.2; they may sum to 1 at most.",
    ),
    (
        changed("texts.own", {"dataset": "a/b", "revision": REVISION}) | {"calibrations": {}},
        "wanda needs a calibration",
    ),
    (changed("texts.biographies.people", 10**9), "texts.biographies: the world's people is 1000000000"),
    # Recipes
    (changed("recipes", [["rtn-5"]]), "recipes.0: there is no step 'rtn-5'. Did you mean 'rtn-4'?"),
    (changed("recipes", [["tiny", "rtn-4"]]), "recipes.0: 'tiny' is a model; a recipe lists steps"),
    (changed("recipes", [{"models": ["tini"], "steps": []}]), "recipes.0.models: there is no model 'tini'."),
    (changed("recipes", [{"seeds": [1]}]), "recipes.0: a recipe needs exactly one of the keys steps and product."),
    (changed("recipes", ["rtn-4"]), 'recipes.0 is "rtn-4"; it should be a mapping of keys to values.'),
    # Evaluations and laws
    (
        changed("evaluations.cost.kind", "costs"),
        "evaluations.cost: its kind must be one of quality, cost, connectivity.",
    ),
    (
        changed("evaluations.basin", {"kind": "connectivity", "perplexity": {}}),
        "evaluations.basin: perplexity names 0 protocols; a connectivity has one.",
    ),
    (
        changed("evaluations.basin", {"kind": "connectivity", "perplexity": {"own": {"text": "bio"}}}),
        "evaluations.basin.perplexity.own.text: there is no text 'bio'.",
    ),
    (changed("evaluations.cost.repeats", 0), "evaluations.cost.repeats is 0; it should be greater than 0."),
    (changed("evaluations.quality.shot", 0), "evaluations.quality: there is no key 'shot'. Did you mean 'shots'?"),
    (changed("evaluations.quality.world", "bio"), "evaluations.quality.world: there is no built-in text 'bio'."),
    (
        changed("texts.others", {"builtin": "biographies", "people": 60}),
        "evaluations.quality asks about the biographies of a built-in text; name one of biographies, others as",
    ),
    (
        changed("evaluations.quality.intrinsic", {"protocol": "won"}),
        "there is no 'won' under `perplexity`. Did you mean 'own'?",
    ),
    (
        changed("evaluations.quality.intrinsic", {"protocol": "own", "length": 33}),
        "evaluations.quality: `intrinsic` requests texts of 33 tokens, but the windows of the protocol 'own' have 32",
    ),
    (changed("evaluations.quality.task_path", "tasks"), "evaluations.quality.task_path: tasks is not a folder"),
    (changed("roofline", {"devices": ["H2000"]}), "roofline.devices.0 is \"H2000\"; it should be 'H200', "),
    (changed("laws.p2.law", "p3"), "laws.p2: there is no law named 'p3'. Did you mean 'p2'?"),
    (changed("laws.p2.law", remove=True), "laws.p2: a law needs the key 'law' with the name of a law."),
    (changed("laws.p2.gian", 0.1), "laws.p2: there is no p2 option 'gian'. Did you mean 'gain'?"),
    (changed("laws.p2.gain", 0), "laws.p2.gain is 0; it should be greater than 0."),
    (changed("laws.p2.file", "points.csv"), "laws.p2.file: points.csv does not exist (looked in"),
    (
        changed("laws.p2.options", {"gain": 0.1}),
        "laws.p2: the key `options` is no longer nested; write the law's options next to `law`, as in `{law: p2, ",
    ),
]


@pytest.mark.parametrize(("study", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_refusals(study, sentence):
    assert sentence in refusal(study)


def test_options_that_were_renamed_are_refused_with_the_new_name(monkeypatch):
    class Options(MethodOptions):
        target_modules: list[str] | None = None
        sequential: bool = False

    entry = SimpleNamespace(options=Options, needs=lambda options: frozenset())
    monkeypatch.setitem(methods(), "new", entry)
    step = {"method": "new", "linears": ["q_proj"], "propagate": True}
    assert (
        "steps.new: the option `linears` is now `target_modules`; rename it. "
        "The option `propagate` is now `sequential`; rename it."
    ) in refusal(changed("steps.new", step))
    study = load_study(changed("steps.new", {"method": "new", "target_modules": ["q_proj"]}))
    assert study.steps["new"].options.target_modules == ["q_proj"]


def test_a_method_that_was_renamed_is_refused_with_the_new_name(monkeypatch):
    entry = SimpleNamespace(options=MethodOptions, needs=lambda options: frozenset())
    monkeypatch.setitem(renamed.METHODS, "old-name", "new-name")
    assert "steps.new: 'old-name' is not a method." in refusal(changed("steps.new", {"method": "old-name"}))
    monkeypatch.setitem(methods(), "new-name", entry)
    sentence = "steps.new: the method `old-name` is now `new-name`; rename it."
    assert sentence in refusal(changed("steps.new", {"method": "old-name"}))


def test_laws_have_typed_options_and_are_written_flat():
    study = load_study(changed("laws.p2", {"law": "p2", "gain": 0.01}))
    assert study.laws["p2"].options.gain == 0.01
    law = effective(study)["laws"]["p2"]
    assert (law["law"], law["gain"], law["bootstrap"]) == ("p2", 0.01, 200)
    assert load_study(effective(study)) == study


def test_a_study_is_read_without_torch_pandas_or_scipy():
    program = (
        "import json, sys\n"
        "from coppice.study.loading import load_study\n"
        "load_study(json.loads(sys.argv[1]))\n"
        "print({'torch', 'pandas', 'scipy', 'transformers', 'pyarrow'} & sys.modules.keys() or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", program, json.dumps(small_study())], capture_output=True, text=True)
    assert done.stdout.strip() == "light", done.stdout + done.stderr


def test_an_unsupported_architecture_is_refused_by_name(tmp_path):
    tiny_folder(tmp_path / "tiny", "gpt2")
    assert "models.tiny.path: tiny/tiny is a model of type 'gpt2'; supported are llama, mistral, olmo2, " in refusal(
        changed("models.tiny.path", "tiny/tiny")
    )


def test_a_text_without_a_part_for_a_role_is_refused(tmp_path):
    (tmp_path / "own.txt").write_text("one\n\ntwo\n")
    study = changed("texts.own", {"path": "own.txt", "splits": {"evaluation": 1}})
    study["calibrations"]["default"]["text"] = "own"
    assert "calibrations.default.text: the text 'own' has no part for calibration; add `calibration`" in refusal(study)


def test_one_source_under_two_names_is_refused(tmp_path):
    (tmp_path / "own.txt").write_text("one\n\ntwo\n")
    study = changed("texts.own", {"path": "own.txt"})
    study["texts"]["again"] = {"path": "tiny/../own.txt"}
    assert "texts.again is the same source as texts.own; use one text with splits" in refusal(study)
    study["texts"]["again"] = {"dataset": "a/b", "revision": REVISION}
    assert load_study(study).texts["own"].path == "own.txt"


def test_every_problem_is_listed():
    study = changed("laws.p2.file", "points.csv")
    study["calibrations"]["default"]["text"] = "bio"
    lines = refusal(study).splitlines()
    assert lines[0] == "The study has 2 problems:"
    assert [line[:4] for line in lines[1:]] == ["  - "] * 2


def test_files_that_are_no_study(tmp_path):
    with pytest.raises(UserError, match="is a folder; name the study's YAML file"):
        load_study(tmp_path)
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        load_study(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"list\.yaml: It must be a mapping"):
        load_study(tmp_path / "list.yaml")


def command(*words: str) -> None:
    parser = argparse.ArgumentParser()
    loading.add_arguments(parser)
    loading.run(parser.parse_args(words))


def test_the_command_prints_the_tree(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(small_study()))
    command("study.yaml")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "small: 11 nodes"
    assert "        eora-2" in lines


def test_the_command_writes_what_later_files_and_keys_changed(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(small_study()))
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"steps": {"rtn-4": {"bits": 3}}}))
    command("study.yaml", "more.yaml", "--config", '{"seed": 7}', "--output", "out.yaml")
    study = load_study(tmp_path / "out.yaml")
    assert (study.seed, study.steps["rtn-4"].options.bits, study.steps["rtn-4"].options.group_size) == (7, 3, 32)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"study\.yaml: There is no key 'sed'"):
        command("study.yaml", "--config", '{"sed": 7}')


@pytest.mark.parametrize("example", sorted((ROOT / "config" / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_sound(example, shared_data, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(tree.nodes(load_study(yaml.safe_load(example.read_text(encoding="utf-8"))))) > 1
