"""Results of a text, a calibration or files that changed under the same name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from manifests import manifest, token_set
from studies import small_study, tiny_folder

from coppice import storage
from coppice.errors import UserError
from coppice.files import sha256
from coppice.methods.options import MethodOptions
from coppice.methods.registry import methods
from coppice.records import renamed
from coppice.records.manifest import Manifest, RecoveryRecord
from coppice.records.node_name import NodeName
from coppice.study import changes, tree
from coppice.study.loading import load_study
from coppice.study.schema import Study

TEXT = {"path": "lives.txt", "splits": {"calibration": 0.5, "recovery": 0.3, "validation": 0.1, "evaluation": 0.1}}
USES = ("calibration.default", "recovery.full-5k", "validation.full-5k", "evaluation.quality.own")


OTHER = {"builtin": "biographies", "people": 9}
QUALITY = {"kind": "quality", "perplexity": {"own": {"text": "biographies", "length": 32, "windows": 4}}}


def study(text: dict[str, Any] = TEXT, calibration: dict[str, Any] | None = None, **sections: Any) -> Study:
    default = {"text": "biographies", "windows": 4, "length": 32, **(calibration or {})}
    return load_study(
        small_study()
        | {"texts": {"biographies": text, "people": OTHER}}
        | {"calibrations": {"default": default}, "evaluations": {"quality": QUALITY}}
        | sections
    )


def manifest_of(node: str, **record: Any) -> Manifest:
    """The manifest of a node of the study, but for what `record` says."""
    name = NodeName(node).step
    step, family = study().steps[name], tree.method_of(study(), name).family
    recorded = {"name": name, "method": step.method, "family": family, "options": step.options.model_dump(mode="json")}
    return manifest(node=node, step=recorded, **record)


def compare(requested: Study, node: str, manifest: Manifest, tokens: Path) -> None:
    changes.refuse_other_node(requested, tree.nodes(requested)[node], manifest, Path("models/manifest.json"), tokens)


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the token sets that the study's model was given, in a project with its text and its model."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path)
    (tmp_path / "lives.txt").write_text("A life.\n")
    recorded = token_set(text=TEXT, text_sha256=sha256(tmp_path / "lives.txt"))
    for use in USES:
        recorded.write(tmp_path / "tokens" / use / "manifest.json")
    return tmp_path / "tokens"


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (
            {"text": TEXT | {"documents": 9}},
            dict.fromkeys(USES, r"text 'biographies' changed: documents \(was None, is 9\)"),
        ),
        (
            {"text": OTHER | {"seed": 1}},
            dict.fromkeys(USES, r"text 'biographies' changed: builtin \(was None, is biographies\), people"),
        ),
        (
            {"calibration": {"windows": 8, "pack": False}},
            {
                "calibration.default": r"the study's calibration 'default' or its text 'biographies' changed: "
                r"windows \(was 4, is 8\), pack \(was True, is False\)"
            },
        ),
        (
            {"calibration": {"text": "people"}},
            {"calibration.default": r"calibration 'default' or its text 'people' changed: builtin \(was None"},
        ),
    ],
)
def test_token_sets_of_another_text_are_refused(
    tokens: Path, change: dict[str, Any], sentences: dict[str, str]
) -> None:
    changed = study(**change)
    for use in USES:
        if use not in sentences:
            changes.refuse_other_tokens(changed, [use], tokens)
            continue
        with pytest.raises(UserError, match=sentences[use]) as caught:
            changes.refuse_other_tokens(changed, [use], tokens)
        assert f"The token set '{use}' was made before" in str(caught.value)
        assert f"remove {tokens / use / 'manifest.json'} from where the results are stored" in str(caught.value)
    changes.refuse_other_tokens(study(), USES, tokens)


def test_tokens_that_are_not_there_are_not_compared(tokens: Path) -> None:
    changes.refuse_other_tokens(study(TEXT | {"documents": 9}), USES, tokens / "elsewhere")


def test_a_texts_file_that_changed_is_refused_where_results_lie_elsewhere(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(storage.VARIABLE, "elsewhere")
    changes.refuse_other_tokens(study(), USES, tokens)
    Path("lives.txt").write_text("Another life.\n")
    with pytest.raises(
        UserError, match=r"text 'biographies' changed: lives\.txt \(was [0-9a-f]{12}, is [0-9a-f]{12}\)"
    ):
        changes.refuse_other_tokens(study(), ["recovery.full-5k"], tokens)
    # On the machine that computed them dates say it, and nothing is read.
    monkeypatch.delenv(storage.VARIABLE)
    changes.refuse_other_tokens(study(), USES, tokens)


def test_a_models_file_that_changed_is_refused_where_results_lie_elsewhere(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree.nodes(study())["tiny"]
    config = Path("tiny/config.json")
    # A machine that lacks a recorded file cannot compare it.
    files = {"config.json": sha256(config), "model.safetensors": "0" * 64}
    recorded = manifest(source_files=files)
    monkeypatch.setenv(storage.VARIABLE, "elsewhere")
    changes.refuse_other_node(study(), root, recorded, Path("manifest.json"), tokens)
    config.write_text('{"model_type": "llama", "hidden_size": 9}')
    with pytest.raises(UserError, match=r"the study's model 'tiny' changed: config\.json \(was [0-9a-f]{12}, is"):
        changes.refuse_other_node(study(), root, recorded, Path("manifest.json"), tokens)
    # An older version did not record the files.
    changes.refuse_other_node(study(), root, manifest(), Path("manifest.json"), tokens)
    monkeypatch.delenv(storage.VARIABLE)
    changes.refuse_other_node(study(), root, recorded, Path("manifest.json"), tokens)


def test_a_node_that_was_calibrated_on_other_tokens_is_refused(tokens: Path) -> None:
    """No option of a step says on which tokens it was calibrated: its calibration may be another, or have changed."""
    node, default = "tiny/wanda-50", {"text": "biographies", "windows": 4, "length": 32}
    changed = study(
        calibrations={"default": default, "other": default | {"windows": 8}},
        steps={"wanda-50": {"method": "wanda", "sparsity": 0.5, "calibration": "other"}},
        recipes=[["wanda-50"]],
        laws={},
    )
    recorded = manifest_of(node, calibration={"moments": "a" * 64})
    compare(changed, node, recorded, tokens)  # of tokens that are not there nothing is known
    token_set(fingerprint="a" * 64).write(tokens / "calibration.other/manifest.json")
    compare(changed, node, recorded, tokens)
    token_set(fingerprint="b" * 64).write(tokens / "calibration.other/manifest.json")
    sentence = (
        r"'tiny/wanda-50' was made before the study's step 'wanda-50' changed: tokens of calibration 'other' "
        r"\(was a{12}, is b{12}\)\. Give what changed a new name, or remove models/manifest\.json"
    )
    with pytest.raises(UserError, match=sentence):
        compare(changed, node, recorded, tokens)


def test_all_that_a_node_was_calibrated_on_counts(tokens: Path) -> None:
    """Of several kinds one may have been gathered before the others."""
    node = "tiny/shortgpt-1/gptq-4"
    token_set(fingerprint="b" * 64).write(tokens / "calibration.default/manifest.json")
    compare(study(), node, manifest_of(node, calibration={"blocks": "b" * 64, "moments": "b" * 64}), tokens)
    with pytest.raises(UserError, match=r"\(was a{12}, b{12}, is b{12}\)"):
        compare(study(), node, manifest_of(node, calibration={"blocks": "b" * 64, "moments": "a" * 64}), tokens)


def recovery(budgets: tuple[int, ...], tokens: int = 5_024) -> RecoveryRecord:
    """The record that training for 5,000 tokens writes, which may have ended before."""
    from coppice.recovery import stage as train

    schedule = SimpleNamespace(order=np.zeros((157, 1)), steps=157)
    planned = SimpleNamespace(budgets=budgets, tokens=lambda step: tokens, schedule=schedule, precision="float32")
    progress = SimpleNamespace(step=157, seconds=1.0)
    windows = SimpleNamespace(tokens=np.zeros((157, 32)))
    return train.recovery_record(planned, progress, SimpleNamespace(name="full"), windows, manifest(), 5_000)


def test_a_recovery_on_another_ladder_of_budgets_is_refused(tokens: Path) -> None:
    node = "tiny/wanda-50/full-5k"
    compare(study(budgets=[1_000, 10_000]), node, manifest_of(node, recovery=recovery((1_000,))), tokens)
    with pytest.raises(UserError, match=r"step 'full-5k' changed: budgets \(was \[1000\], is \[1000, 2000\]\)"):
        compare(study(budgets=[2_000, 1_000]), node, manifest_of(node, recovery=recovery((1_000,))), tokens)
    with pytest.raises(UserError, match=r"budgets \(was \[1000\], is \[\]\)"):
        compare(study(budgets=[]), node, manifest_of(node, recovery=recovery((1_000,))), tokens)


def test_a_rung_that_a_recovery_does_not_reach_is_no_change(tokens: Path) -> None:
    """The workflow passes a recovery the rungs up to its requested tokens; it may end before."""
    node = "tiny/wanda-50/full-5k"
    compare(study(budgets=[1_000, 5_010]), node, manifest_of(node, recovery=recovery((1_000,))), tokens)
    ended_early = recovery((1_000, 4_000), tokens=2_016)
    compare(study(budgets=[1_000, 3_000]), node, manifest_of(node, recovery=ended_early), tokens)
    with pytest.raises(UserError, match=r"budgets \(was \[1000\], is \[1000, 2000\]\)"):
        compare(study(budgets=[1_000, 2_000]), node, manifest_of(node, recovery=ended_early), tokens)


def test_a_recovery_of_a_version_that_recorded_no_budgets_is_accepted(tokens: Path) -> None:
    node = "tiny/wanda-50/full-5k"
    recorded = recovery((1_000,)).model_copy(update={"budgets": None})
    compare(study(budgets=[9]), node, manifest_of(node, recovery=recorded), tokens)
    # A node that was compressed after it carries its record on, and was not trained itself.
    below = "tiny/shortgpt-1/full-5k/gptq-4"
    compare(study(budgets=[9]), below, manifest_of(below, recovery=recovery((1_000,))), tokens)


def test_names_that_an_older_version_recorded_are_not_a_change(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Options(MethodOptions):
        sequential: bool = False

    entry = SimpleNamespace(options=Options, needs=lambda options: frozenset())
    monkeypatch.setitem(methods(), "new-name", entry)
    monkeypatch.setitem(renamed.METHODS, "old-name", "new-name")
    steps = small_study()["steps"] | {"new": {"method": "new-name", "sequential": True}}
    node, path = tree.StepNode("tiny/new", "tiny", "tiny", "new", 0), Path("manifest.json")
    step = {"name": "new", "method": "old-name", "family": "quantize", "options": {"propagate": True}}
    changes.refuse_other_node(study(steps=steps), node, manifest(step=step), path, tokens)
    other = manifest(step=step | {"options": {"propagate": False}})
    with pytest.raises(UserError, match=r"changed: sequential \(was False, is True\)"):
        changes.refuse_other_node(study(steps=steps), node, other, path, tokens)
