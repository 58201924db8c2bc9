"""What is wrong is said in one sentence that names the place, the exit code says it too, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file, save_file

from coppice.cli import main
from coppice.files import read_json, write_json
from coppice.results.collection import write_tables
from coppice.study.loading import effective, load_study, write_effective
from tests.nodes import gather, save_root, save_text, save_tokenizer, save_windows
from tests.tiny import tiny_model

SPLITS = dict.fromkeys(("calibration", "recovery", "validation", "evaluation"), 0.25)
TRAINING = {"text": "words", "validation": "words", "validation_windows": 8, "length": 16, "tokens": 640}


def study() -> dict[str, Any]:
    """A study of one tiny model with a step of every kind."""
    return {
        "study": "bad",
        "models": {"tiny": {"path": "tiny"}},
        "texts": {"words": {"path": "words.txt", "splits": SPLITS}},
        "calibrations": {"default": {"text": "words", "windows": 8, "length": 16}},
        "steps": {
            "magnitude-50": {"method": "magnitude", "sparsity": 0.5},
            "magnitude-24": {"method": "magnitude", "pattern": "2:4"},
            "rtn-4": {"method": "rtn", "bits": 4, "group_size": 16},
            "gptq-4": {"method": "gptq", "bits": 4, "group_size": 16},
            "svd-80": {"method": "svd", "keep": 0.8},
            "eora-2": {"method": "eora", "rank": 2},
            "full": {"method": "full", **TRAINING},
            "lora": {"method": "lora", **TRAINING},
        },
        "recipes": [["magnitude-50", "full", "gptq-4", "eora-2"]],
        "evaluations": {
            "quality": {"kind": "quality", "perplexity": {"words": {"text": "words", "length": 16, "windows": 8}}}
        },
    }


def changed(place: str, value: Any) -> dict[str, Any]:
    """The study with another value at a dotted place; a place that is not there is made."""
    whole = study()
    *path, last = place.split(".")
    target = whole
    for key in path:
        target = target[key]
    target[last] = value
    return whole


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a text."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "tiny")
    save_tokenizer(folder / "tiny")
    save_text(folder / "words.txt", documents=120)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command which fails prints, without its `error: `."""
    capsys.readouterr()
    assert main(list(words)) == 1
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


BAD_STUDIES: list[tuple[dict[str, Any], str]] = [
    (changed("bugdets", []), "study.yaml: There is no key 'bugdets'. Did you mean 'budgets'?"),
    (
        changed("texts.words", {"path": "words.txt", "slpits": SPLITS}),
        "texts.words: there is no key 'slpits'. Did you mean 'splits'?",
    ),
    (changed("steps.rtn-4.method", "gtpq"), "steps.rtn-4: 'gtpq' is not a method. Did you mean 'gptq'?"),
    (changed("steps.rtn-4.groupsize", 16), "steps.rtn-4: there is no rtn option 'groupsize'. Did you mean"),
    (changed("steps.rtn-4.bits", 1), "steps.rtn-4.bits is 1; it should be greater than or equal to 2."),
    (changed("steps.rtn-4.bits", 9), "steps.rtn-4.bits is 9; it should be less than or equal to 8."),
    (changed("steps.rtn-4.group_size", 0), "steps.rtn-4.group_size: a group size is a positive number of inputs"),
    (changed("steps.magnitude-50.sparsity", 1.0), "steps.magnitude-50.sparsity is 1.0; it should be less than 1."),
    (changed("steps.magnitude-50.sparsity", -0.1), "steps.magnitude-50.sparsity is -0.1; it should be greater than"),
    (changed("steps.magnitude-24.pattern", "4:2"), "steps.magnitude-24.pattern: the pattern '4:2' is not 'N:M'"),
    (changed("steps.magnitude-24.sparsity", 0.5), "steps.magnitude-24: give exactly one of 'sparsity' and 'pattern'."),
    (changed("steps.svd-80.keep", 0), "steps.svd-80.keep is 0; it should be greater than 0."),
    (changed("steps.full.tokens", 0), "steps.full.tokens is 0; it should be greater than or equal to 1."),
    (changed("recipes", [["wanda-50"]]), "recipes.0: there is no step 'wanda-50'."),
    (
        changed("recipes", [["rtn-4", "magnitude-50"]]),
        "recipes.0 (rtn-4 > magnitude-50): the step 'magnitude-50' (magnitude) cannot work on a quantized model",
    ),
    (
        changed("recipes", [["rtn-4", "full"]]),
        "recipes.0 (rtn-4 > full): the step 'full' (full) cannot work on a quantized model, because packed integers "
        "cannot be trained; use lora.",
    ),
    (
        changed("recipes", [["magnitude-50", "svd-80"]]),
        "the step 'svd-80' (svd) cannot work on a masked model",
    ),
    (changed("recipes", [["eora-2"]]), "recipes.0 (eora-2): the step 'eora-2' (eora) has nothing to compensate"),
    (
        changed("recipes", [["magnitude-50", "full", "eora-2"]]),
        "the step 'eora-2' (eora) has nothing to compensate: put it after a step that prunes",
    ),
    (changed("texts.words.path", "lost.txt"), "texts.words.path: lost.txt does not exist"),
    (changed("models.tiny.path", "lost"), "models.tiny.path: lost is not a model folder"),
    (changed("calibrations.default.length", 1), "calibrations.default.length is 1; it should be greater than"),
    (
        changed("texts.words.splits", {"calibration": 0.5, "recovery": 0.5}),
        "the text 'words' has no part for",
    ),
]


@pytest.mark.parametrize(("bad", "sentence"), BAD_STUDIES, ids=[sentence[:60] for _, sentence in BAD_STUDIES])
def test_a_bad_study_is_refused_in_place(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bad: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(bad, sort_keys=False))
    assert main(["study", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out.yaml")]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {tmp_path / 'study.yaml'}")
    assert sentence in printed.err
    assert "Traceback" not in printed.err + printed.out
    assert not (tmp_path / "out.yaml").exists()


def test_the_study_that_the_bad_ones_come_from_is_good(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "good.yaml").write_text(yaml.safe_dump(study(), sort_keys=False))
    assert main(["study", "good.yaml"]) == 0


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (changed("sed", 1), "error: The study: There is no key 'sed'. Did you mean 'seed'?"),
        (
            changed("recipes", [["rtn-4", "full"]]),
            "error: The study: recipes.0 (rtn-4 > full): the step 'full' (full) cannot work on a quantized model, "
            "because packed integers cannot be trained; use lora.",
        ),
    ],
)
def test_snakemake_ends_with_the_sentence_of_a_bad_study(
    place: Path, snakemake: Callable, bad: dict[str, Any], sentence: str
) -> None:
    (place / "bad.yaml").write_text(yaml.safe_dump(bad, sort_keys=False))
    done = snakemake(place, "--dry-run", "--configfile", str(place / "bad.yaml"))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == sentence
    assert 'File "' not in done.stdout
    assert not (place / "results").exists()


# Commands on bad files


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root, with windows and moments beside it."""
    folder = tmp_path_factory.mktemp("root")
    save_root(folder / "root")
    save_windows(folder / "windows", folder / "root")
    gather(folder / "root", folder / "windows", "moments", folder / "moments")
    return folder / "root"


def tokenize(root: Path, output: Path, text: dict[str, Any], windows: int = 8) -> list[str]:
    asked = ["--role", "calibration", "--windows", str(windows), "--length", "16"]
    text = {"splits": {"calibration": 1.0}, **text}
    return ["tokenize", "--tokenizer", str(root), "--text", json.dumps(text), *asked, "--output", str(output)]


def compress(parent: Path, output: Path, method: str, *words: str, **options: Any) -> list[str]:
    step = json.dumps({"name": f"step-{method}", "method": method, "options": options})
    named = ["--node", "tiny/step", "--parent", str(parent), "--step", step]
    return ["compress", *named, *words, "--threads", "1", "--device", "cpu", "--output", str(output)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "words.txt does not exist."),
        (b"", "words.txt holds no documents."),
        (b"\n \n\n", "words.txt holds no documents."),
        (b"w5 w6\nw7 \xff\xfe w8\n", "words.txt, line 2: not UTF-8"),
        (b"w5 w6 w7\n", "words.txt has 0 windows of 16 tokens for the role 'calibration', but 8 are requested"),
    ],
    ids=["missing", "empty", "blank", "not UTF-8", "too short"],
)
def test_a_bad_text_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    words = tokenize(root, tmp_path / "tokens", {"path": str(tmp_path / "words.txt")})
    assert sentence in refusal(capsys, *words)
    assert not (tmp_path / "tokens").exists()


def test_a_calibration_that_is_too_short_says_how_much_there_is(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = save_text(tmp_path / "words.txt", documents=40, words=31)
    # 40 documents of 31 words, each after a token that begins it, are 80 windows of 16 tokens.
    words = tokenize(root, tmp_path / "tokens", text | {"splits": {"calibration": 1.0}}, windows=81)
    assert "has 80 windows of 16 tokens for the role 'calibration', but 81 are requested" in refusal(capsys, *words)
    assert not (tmp_path / "tokens").exists()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupted(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def without_a_key(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def with_a_smaller_vocabulary(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:50].clone()
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"vocab_size": 50})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncated, "model.safetensors is not a whole safetensors file"),
        (corrupted, "model.safetensors is not a whole safetensors file"),
        (without_a_key, "do not fit its config.json: model.layers.1.mlp.up_proj.weight is missing."),
        (with_a_smaller_vocabulary, "has ids up to 60 but the model's vocabulary is 50"),
    ],
)
def test_a_bad_model_is_named(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    sentence: str,
) -> None:
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    damage(tmp_path / "tiny")
    words = ["root", "--node", "tiny", "--source", json.dumps({"path": str(tmp_path / "tiny")})]
    said = refusal(capsys, *words, "--output", str(tmp_path / "root"))
    assert sentence in said
    assert str(tmp_path / "tiny") in said
    assert not (tmp_path / "root" / "manifest.json").exists()


def test_a_damaged_checkpoint_is_refused_by_its_hash(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root, tmp_path / "root")
    weights = bytearray((tmp_path / "root" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "root" / "model.safetensors").write_bytes(weights)
    said = refusal(capsys, *compress(tmp_path / "root", tmp_path / "node", "magnitude", sparsity=0.5))
    assert "model.safetensors is not the file that its manifest describes; recompute the node 'tiny'." in said
    assert not (tmp_path / "node" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (
            "rtn",
            {"bits": 4, "group_size": 32},
            "model.layers.0.mlp.down_proj: A group size of 32 does not divide the 48 inputs of this layer",
        ),
        (
            "magnitude",
            {"pattern": "1:5"},
            "model.layers.0.self_attn.q_proj: The pattern 1:5 needs a number of inputs that 5 divides",
        ),
    ],
)
def test_a_size_that_does_not_divide_names_the_layer_and_what_would(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    options: dict[str, Any],
    sentence: str,
) -> None:
    said = refusal(capsys, *compress(root, tmp_path / "node", method, **options))
    assert said.startswith(sentence)
    assert not (tmp_path / "node" / "manifest.json").exists()


def test_statistics_of_another_model_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_root(tmp_path / "other", tiny_model(seed=1))
    statistics = root.parent / "moments"
    words = compress(other, tmp_path / "node", "wanda", "--statistics", str(statistics), sparsity=0.5)
    said = refusal(capsys, *words)
    assert said.startswith(f"The statistics in {statistics} were gathered on another model (fingerprint ")
    assert not (tmp_path / "node" / "manifest.json").exists()


def test_propagation_without_tokens_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = compress(root, tmp_path / "node", "wanda", sparsity=0.5, sequential=True)
    said = refusal(capsys, *words)
    assert said.startswith("Step 'step-wanda' (wanda) needs the calibration windows themselves;")
    assert not (tmp_path / "node" / "manifest.json").exists()


def test_windows_of_another_tokenizer_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root, tmp_path / "root")
    tokenizer = read_json(tmp_path / "root" / "tokenizer.json")
    write_json(tmp_path / "root" / "tokenizer.json", tokenizer | {"added_tokens": tokenizer["added_tokens"][:1]})
    named = ["--model", str(tmp_path / "root"), "--tokens", str(root.parent / "windows"), "--kind", "moments"]
    said = refusal(capsys, "calibrate", *named, "--threads", "1", "--output", str(tmp_path / "moments"))
    assert "was cut into windows with another tokenizer than that of" in said
    assert not (tmp_path / "moments").exists()


# A study with a step that fails


def test_other_branches_finish_and_a_corrected_study_completes(
    snakemake: Callable, forks: dict[str, str], place: Path, tmp_path: Path
) -> None:
    """A failed node is a row, told on the page, and a run of MLflow that failed; the rest of the study is there."""
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    shutil.copyfile(place / "words.txt", tmp_path / "words.txt")
    broken = changed("steps.rtn-4.group_size", 32) | {"recipes": [["rtn-4", "lora"], ["magnitude-50"]]}
    broken["evaluations"]["quality"]["nodes"] = ["tiny/magnitude-50"]
    results = tmp_path / "results" / "bad"
    words = ["--configfile", str(tmp_path / "study.yaml")]

    (tmp_path / "study.yaml").write_text(yaml.safe_dump(broken, sort_keys=False))
    done = snakemake(tmp_path, *words, environment=forks)
    assert done.returncode != 0
    assert {"tiny", "tiny/magnitude-50"} == set(pd.read_parquet(results / "tables/nodes.parquet").node)
    assert {"tiny/magnitude-50"} == set(pd.read_parquet(results / "tables/metrics.parquet").node)
    failure = pd.read_parquet(results / "tables/failures.parquet").to_dict("records")
    assert [(row["node"], row["stage"], row["log"]) for row in failure] == [
        ("tiny/rtn-4", "compress", "logs/compress/tiny/rtn-4.log")
    ]
    sentence = "model.layers.0.mlp.down_proj: A group size of 32 does not divide the 48 inputs of this layer"
    assert failure[0]["error"].startswith(sentence)
    assert f"error: {sentence}" in done.stdout  # what the log says is shown
    assert "results/bad/report/index.html shows what was achieved, and what failed." in done.stdout
    assert sentence in (results / "report/index.html").read_text()
    assert statuses(tmp_path) == {".": "FINISHED", "tiny": "FINISHED", "tiny/magnitude-50": "FINISHED"} | {
        "tiny/rtn-4": "FAILED"
    }

    fixed = broken | {"steps": study()["steps"]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(fixed, sort_keys=False))
    done = snakemake(tmp_path, *words, environment=forks)
    assert done.returncode == 0, done.stdout
    assert "coppice root" not in done.stdout
    assert pd.read_parquet(results / "tables/failures.parquet").empty
    assert sentence not in (results / "report/index.html").read_text()
    nodes = {"tiny", "tiny/magnitude-50", "tiny/rtn-4", "tiny/rtn-4/lora"}
    assert set(pd.read_parquet(results / "tables/nodes.parquet").node) == nodes
    assert statuses(tmp_path) == dict.fromkeys({".", *nodes}, "FINISHED")


def test_laws_that_cannot_be_fitted_are_failures_and_the_others_are_fitted(
    snakemake: Callable, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables exist already: a dense model, and no measurement of it. The page cannot be made."""
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    ratios = [0.1, 0.3, 0.5, 0.7]
    points = pd.DataFrame({"run": "r", "model": "tiny", "method": "m", "ratio": ratios, "dense_score": 1.0})
    points.to_csv("unscored.csv", index=False)
    points.assign(score=[(1 - ratio) ** 0.5 for ratio in ratios]).to_csv("scored.csv", index=False)
    laws = {
        "column": {"law": "pruning", "file": "unscored.csv"},
        "metric": {"law": "k-bit", "metric": "perplexity_lost"},
        "whole": {"law": "pruning", "file": "scored.csv", "bootstrap": 0},
    }
    described = load_study({"study": "bad", "models": {"tiny": {"path": "tiny"}}, "laws": laws})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(effective(described)))
    results = tmp_path / "results" / "bad"
    dense = ["root", "--node", "tiny", "--source", '{"path": "tiny"}', "--output", str(results / "models" / "tiny")]
    assert main(dense) == 0
    write_effective(described, results / "study.yaml")
    write_tables(described, results, results / "tables")
    (results / "report").write_text("A file where the page's folder is to be.\n")

    done = snakemake(tmp_path, "laws", "--configfile", str(tmp_path / "study.yaml"))
    assert done.returncode != 0
    assert read_json(results / "laws/whole/fit.json")["parameters"]["alpha"]["value"] == pytest.approx(0.5, rel=1e-3)
    sentences = {
        "column": "unscored.csv has no column 'score'. Did you mean 'dense_score'? The law needs a column for 'score'; "
        "name it as {score: <column>} in the option `columns`.",
        "metric": "The tables hold no measurement of perplexity_lost; name one of their metrics as the law's option "
        "`metric`.",
    }
    failures = pd.read_parquet(results / "tables/failures.parquet")
    assert set(failures.stage) == {"fit"}
    assert failures.node.isna().all()
    assert dict(zip(failures.log, failures.error, strict=True)) == {
        f"logs/fit/{law}.log": sentence for law, sentence in sentences.items()
    }
    for law, sentence in sentences.items():
        assert (results / f"logs/fit/{law}.log").read_text().splitlines()[-1] == f"error: {sentence}"
        assert f"error: {sentence}" in done.stdout
        assert not (results / "laws" / law).exists()
    # A missing page does not suppress the other messages.
    assert "No report of this run was written: " in done.stdout
    assert statuses(tmp_path)["tiny"] == "FINISHED"


def statuses(folder: Path) -> dict[str, str]:
    """The status of each node's run in MLflow; the study's own is named by a dot."""
    from coppice.tracking import connect

    client = connect(f"sqlite:///{folder / 'results' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("bad").experiment_id
    return {run.data.tags["coppice.node"]: run.info.status for run in client.search_runs([experiment])}
