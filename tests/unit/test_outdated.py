"""Results of a text, a calibration or files that changed under the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies import small_study, tiny_folder

from coppice import outdated, store, tree
from coppice.errors import UserError
from coppice.files import sha256, write_json
from coppice.study import Study, load_study

TEXT = {"path": "lives.txt", "splits": {"calibration": 0.5, "recovery": 0.3, "validation": 0.1, "evaluation": 0.1}}
USES = ("calibration.default", "recovery.full-5k", "validation.full-5k", "evaluation.quality.own")


OTHER = {"builtin": "biographies", "people": 9}
QUALITY = {"kind": "quality", "perplexity": {"own": {"text": "biographies", "length": 32, "windows": 4}}}


def study(text: dict[str, Any] = TEXT, calibration: dict[str, Any] | None = None) -> Study:
    described = {"text": "biographies", "windows": 4, "length": 32, **(calibration or {})}
    return load_study(
        small_study()
        | {"texts": {"biographies": text, "people": OTHER}}
        | {"calibrations": {"default": described}, "evaluations": {"quality": QUALITY}}
    )


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the token sets that the study's model was given, in a project with its text and its model."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path)
    (tmp_path / "lives.txt").write_text("A life.\n")
    made = {"text": TEXT, "text_sha256": sha256(tmp_path / "lives.txt"), "windows": 4, "length": 32, "packed": True}
    for use in USES:
        write_json(tmp_path / "tokens" / use / "manifest.json", made)
    return tmp_path / "tokens"


@pytest.mark.parametrize(
    ("changes", "said"),
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
def test_token_sets_of_another_text_are_refused(tokens: Path, changes: dict[str, Any], said: dict[str, str]) -> None:
    changed = study(**changes)
    for use in USES:
        if use not in said:
            outdated.refuse_other_tokens(changed, [use], tokens)
            continue
        with pytest.raises(UserError, match=said[use]) as caught:
            outdated.refuse_other_tokens(changed, [use], tokens)
        assert f"The token set '{use}' was made before" in str(caught.value)
        assert f"remove {tokens / use / 'manifest.json'} from where the results are stored" in str(caught.value)
    outdated.refuse_other_tokens(study(), USES, tokens)


def test_tokens_that_are_not_there_tell_nothing(tokens: Path) -> None:
    outdated.refuse_other_tokens(study(TEXT | {"documents": 9}), USES, tokens / "elsewhere")


def test_a_texts_file_that_changed_is_refused_where_results_lie_elsewhere(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.VARIABLE, "elsewhere")
    outdated.refuse_other_tokens(study(), USES, tokens)
    Path("lives.txt").write_text("Another life.\n")
    with pytest.raises(
        UserError, match=r"text 'biographies' changed: lives\.txt \(was [0-9a-f]{12}, is [0-9a-f]{12}\)"
    ):
        outdated.refuse_other_tokens(study(), ["recovery.full-5k"], tokens)
    # Elsewhere dates tell it, and nothing is read.
    monkeypatch.delenv(store.VARIABLE)
    outdated.refuse_other_tokens(study(), USES, tokens)


def test_a_models_file_that_changed_is_refused_where_results_lie_elsewhere(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree.nodes(study())["tiny"]
    config = Path("tiny/config.json")
    # A machine that lacks a recorded file cannot compare it.
    files = {"config.json": sha256(config), "model.safetensors": "0" * 64}
    manifest = {"source": {"path": "tiny"}, "seed": 0, "source_files": files}
    monkeypatch.setenv(store.VARIABLE, "elsewhere")
    outdated.refuse_other_node(study(), root, manifest, Path("manifest.json"))
    config.write_text('{"model_type": "llama", "hidden_size": 9}')
    with pytest.raises(UserError, match=r"the study's model 'tiny' changed: config\.json \(was [0-9a-f]{12}, is"):
        outdated.refuse_other_node(study(), root, manifest, Path("manifest.json"))
    # Of what an older version made nothing is recorded.
    outdated.refuse_other_node(study(), root, manifest | {"source_files": {}}, Path("manifest.json"))
    monkeypatch.delenv(store.VARIABLE)
    outdated.refuse_other_node(study(), root, manifest, Path("manifest.json"))
