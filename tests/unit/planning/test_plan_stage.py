"""What is left of a study that was changed, by what its results say of how they were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from manifests import manifest, metrics, recovery, token_set

from coppice.cli import main
from coppice.planning import stage
from coppice.planning.jobs import JobGraph
from coppice.planning.sizes import node_sizes
from coppice.planning.text import lines
from coppice.planning.work import sized_jobs
from coppice.records.manifest import Manifest
from coppice.study import tree
from coppice.study.loading import load_study, write_effective
from coppice.study.schema import SHIPPED, Study

GRID = {"method": "rtn", "bits": 4, "group_size": 32}
TRAINING = {"text": "lives", "validation": "lives", "length": 32, "validation_windows": 4, "batch_size": 4}
QUALITY = {"kind": "quality", "perplexity": {"own": {"text": "lives", "length": 32, "windows": 4}}}
MACHINE = {"cores": 2, "gpus": 0, "device": None, "memory": 64e9, "disk": 1e12}


def described(**changes: Any) -> dict[str, Any]:
    """One shipped model, a chain of two steps and a step beside it, as a YAML reader gives it."""
    return {
        "study": "small",
        "models": {"tiny": {"shipped": "bio-tiny"}},
        "texts": {"lives": {"builtin": "biographies", "people": 50}},
        "calibrations": {"default": {"text": "lives", "windows": 4, "length": 32}},
        "steps": {
            "wanda-50": {"method": "wanda", "sparsity": 0.5},
            "full": {"method": "full", **TRAINING, "tokens": 5_000_000},
            "rtn-4": GRID,
        },
        "recipes": [["wanda-50", "full"], ["rtn-4"]],
        "evaluations": {"quality": QUALITY},
        "laws": {"p2": {"law": "p2"}},
        **changes,
    }


def steps(**changes: Any) -> dict[str, Any]:
    """The study's steps, some of them with other options."""
    known = described()["steps"]
    return {**known, **{name: known[name] | options for name, options in changes.items()}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the whole study, as the stages write what the plan reads of them."""
    study, results = load_study(described()), tmp_path_factory.mktemp("finished")
    uses, nodes = tree.token_uses(study), tree.nodes(study)
    for job in sized_jobs(JobGraph(study), node_sizes(study, Path("nowhere"))):
        path = results / job.output
        path.parent.mkdir(parents=True, exist_ok=True)
        if job.stage in ("root", "compress", "recover"):
            node_manifest(study, nodes[job.name]).write(path)
            (path.parent / "config.json").write_text((SHIPPED / "bio-tiny/config.json").read_text())
        elif job.stage == "tokenize":
            use = uses[job.kind]
            text = study.texts[use.text].model_dump(mode="json")
            token_set(windows=use.windows, length=use.length, packed=use.pack, fingerprint=job.kind, text=text).write(
                path
            )
        elif job.stage == "evaluate":
            metrics(options=study.evaluations[job.kind].model_dump(mode="json", exclude={"nodes", "world"})).write(path)
        else:
            path.write_text("{}")
        log = results / "benchmarks" / job.stage / f"{job.name}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps({"s": 10.0, "max_rss": 500.0}) + "\n")
    write_effective(study, results / "study.yaml")
    return results


def node_manifest(study: Study, node: tree.Node) -> Manifest:
    """The manifest of a node of the size that the plan estimates."""
    size = node_sizes(study, Path("nowhere"))[node.name]
    parameters, linears = int(size.parameters), int(size.linears)
    described = {
        "node": node.name,
        "parameters": {"total": parameters, "blocks": linears, "decoder_linears": linears, "nonzero": parameters},
        "stored_bits": {"total": int(8 * size.stored), "decoder_linears": int(8 * size.linear_bytes)},
        "stored_bytes": int(size.stored),
        "seed": node.seed,
        "source": study.models[node.model].model_dump(mode="json"),
    }
    if node.step is None:
        return manifest(**described)
    method, options = tree.method_of(study, node.step), study.steps[node.step].options
    step = {"name": node.step, "method": method.name, "family": method.family}
    calibrated = {"moments": "calibration.default"} if tree.calibration(study, node.step) else None
    trained = recovery(tokens=5_000_000, tokens_requested=5_000_000, budgets=study.budgets)
    return manifest(
        **described,
        step=step | {"options": options.model_dump(mode="json")},
        calibration=calibrated,
        recovery=trained if method.family == "recover" else None,
    )


def planned(results: Path, **changes: Any) -> dict[str, Any]:
    return stage.plan(load_study(described(**changes)), results, MACHINE)


def left(made: dict[str, Any]) -> dict[str, int]:
    """How many jobs of each stage are left, where any are."""
    return {row["stage"]: row["left"] for row in made["stages"] if row["left"]}


GATHERED = {"study": 1, "tables": 1, "fit": 1, "report": 1, "track": 1}


def test_of_a_study_that_did_not_change_nothing_is_left(finished: Path) -> None:
    made = planned(finished)
    assert (left(made), made["changed"]) == ({}, [])
    assert all(node["done"] and not node["changed"] for node in made["nodes"])
    assert "; 0 of " in lines(made)[0]


def test_a_changed_step_is_left_with_all_that_follows_from_it(finished: Path) -> None:
    made = planned(finished, steps=steps(**{"wanda-50": {"sparsity": 0.9}}))
    assert left(made) == {"compress": 1, "recover": 1, "evaluate": 2, **GATHERED}
    states = {node["node"]: (node["done"], node["changed"], node["evaluations_done"]) for node in made["nodes"]}
    again = (False, True, 0)
    assert states == {
        **dict.fromkeys(("tiny", "tiny/rtn-4"), (True, False, 1)),
        **dict.fromkeys(("tiny/wanda-50", "tiny/wanda-50/full"), again),
    }
    assert [(row["stage"], row["name"]) for row in made["changed"]] == [
        ("study", "study"),
        ("compress", "tiny/wanda-50"),
    ]
    assert "sparsity (was 0.5, is 0.9)" in made["changed"][1]["why"]
    text = lines(made)
    assert (
        text[1] == "Changed since they were computed: 1 node (tiny/wanda-50). What follows from them is recomputed too."
    )
    [row] = [line for line in text if line.strip().startswith("wanda-50")]
    assert row.split()[1] == "changed"


def test_another_seed_leaves_every_job(finished: Path) -> None:
    made = planned(finished, seed=7)
    assert made["total"]["left"] == made["total"]["jobs"]
    assert lines(made)[1].startswith("Changed since they were computed: 4 nodes (")


@pytest.mark.parametrize(
    ("changes", "changed", "expected"),
    [
        (
            {"calibrations": {"default": {"text": "lives", "windows": 8, "length": 32}}},
            ["tiny/calibration.default"],
            {"tokenize": 1, "calibrate": 1, "compress": 1, "recover": 1, "evaluate": 2},
        ),
        (
            {"evaluations": {"quality": QUALITY | {"tasks": ["biographies"], "limit": 4}}},
            [f"{node}/quality" for node in ("tiny", "tiny/wanda-50", "tiny/wanda-50/full", "tiny/rtn-4")],
            {"evaluate": 4},
        ),
        ({"laws": {"p2": {"law": "p2", "gain": 0.5}}}, [], {}),
    ],
    ids=["calibration", "evaluation", "law"],
)
def test_what_else_changed_is_named_and_left(
    finished: Path, changes: dict[str, Any], changed: list[str], expected: dict[str, int]
) -> None:
    made = planned(finished, **changes)
    assert [row["name"] for row in made["changed"]] == ["study", *changed]
    assert left(made) == expected | GATHERED
    [key] = changes
    assert made["changed"][0]["why"] == f"The study's {key} differ from those in {finished / 'study.yaml'}."
    assert (key if not changed else changed[0]) in " ".join(lines(made)[1:3])


def test_what_gathers_a_missing_result_is_left(finished: Path, tmp_path: Path) -> None:
    """As after an interruption, or a failure: tables and page are there, and are recomputed."""
    results = shutil.copytree(finished, tmp_path / "results")
    (results / "models/tiny/rtn-4/manifest.json").unlink()
    (results / "evaluations/tiny/rtn-4/quality/metrics.json").unlink()
    gather = {name: count for name, count in GATHERED.items() if name != "study"}
    made = planned(results)
    assert left(made) == {"compress": 1, "evaluate": 1, **gather}
    assert made["changed"] == []
    [row] = [node for node in made["nodes"] if not node["done"]]
    assert (row["node"], row["changed"]) == ("tiny/rtn-4", False)


def test_what_follows_from_a_missing_node_is_left(finished: Path, tmp_path: Path) -> None:
    """As after a failure of a step that was changed."""
    results = shutil.copytree(finished, tmp_path / "results")
    (results / "models/tiny/wanda-50/manifest.json").unlink()
    made = planned(results)
    gather = {name: count for name, count in GATHERED.items() if name != "study"}
    assert left(made) == {"compress": 1, "recover": 1, "evaluate": 2, **gather}
    states = {node["node"]: (node["done"], node["changed"]) for node in made["nodes"]}
    assert states["tiny/wanda-50"] == (False, False)
    assert states["tiny/wanda-50/full"] == (False, True)


def test_missing_statistics_make_nothing_again(finished: Path, tmp_path: Path) -> None:
    results = shutil.copytree(finished, tmp_path / "results")
    (results / "statistics/tiny/default/moments/manifest.json").unlink()
    assert left(planned(results)) == {"calibrate": 1}


def test_benchmarks_are_of_the_work_that_there_was(finished: Path, tmp_path: Path) -> None:
    results = shutil.copytree(finished, tmp_path / "results")
    longer = load_study(described(steps=steps(full={"tokens": 50_000_000})))

    def work(study: Study) -> float:
        return next(
            job for job in sized_jobs(JobGraph(study), node_sizes(study, results)) if job.stage == "recover"
        ).operations

    [record] = stage.records_of_last_run(longer, results)["recover"]
    assert record.operations == work(load_study(described()))
    assert work(longer) > 9 * record.operations
    # The run of the longer study ended before this recovery: whose work its benchmark was of is not known.
    write_effective(longer, results / "study.yaml")
    assert "recover" not in stage.records_of_last_run(longer, results)
    # A study of which something is no longer there tells no more than none.
    (results / "study.yaml").write_text("study: small\nmodels: {tiny: {path: lost}}\n")
    assert "recover" not in stage.records_of_last_run(longer, results)
    assert stage.records_of_last_run(longer, results)["compress"]


def test_nodes_that_are_made_again_are_as_large_as_they_will_be(tmp_path: Path) -> None:
    before, after = (
        load_study(described(steps={"svd-50": {"method": "svd", "keep": keep}}, recipes=[["svd-50"]], laws={}))
        for keep in (0.5, 0.9)
    )
    nodes = tree.nodes(before)
    for name in ("tiny", "tiny/svd-50"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        node_manifest(before, nodes[name]).write(folder / "manifest.json")
        (tmp_path / "models" / name / "config.json").write_text((SHIPPED / "bio-tiny/config.json").read_text())
    made = {node["node"]: node for node in stage.plan(after, tmp_path, MACHINE)["nodes"]}
    expected = node_sizes(after, Path("nowhere"))["tiny/svd-50"]
    assert made["tiny/svd-50"]["stored_bytes"] == round(expected.stored)
    assert made["tiny/svd-50"]["size"] == "estimated"

    other = load_study(described(models={"tiny": {"shipped": "bio-small"}}, recipes=[], laws={}))
    [root] = stage.plan(other, tmp_path, MACHINE)["nodes"]
    assert root["changed"]
    assert root["parameters"] == round(node_sizes(other, Path("nowhere"))["tiny"].parameters)


def test_a_gpu_that_is_named_is_one_unless_more_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(described()))

    def printed(*words: str) -> dict[str, Any]:
        assert main(["plan", str(path), "--results", str(tmp_path / "results"), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    named, one = printed("--device", "H100-SXM"), printed("--device", "H100-SXM", "--gpus", "1")
    assert named["machine"]["gpus"] == 1
    assert named["total"]["elapsed_seconds"] == one["total"]["elapsed_seconds"]
    assert printed("--device", "H100-SXM", "--gpus", "2")["machine"]["gpus"] == 2
    # A CPU is no GPU, and neither is what is not named.
    assert printed("--device", "i9-13900K")["machine"]["gpus"] == printed()["machine"]["gpus"] == 0

    words = ["plan", str(path), "--results", str(tmp_path / "results"), "--device", "H100-SXM"]
    assert main(words) == 0
    assert " at once on 1 GPU: " in capsys.readouterr().out
    assert main([*words, "--gpus", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: --gpus 0: H100-SXM is a GPU;")


@pytest.mark.parametrize("text", ["", "- a\n", "a\n"], ids=["empty", "list", "word"])
def test_a_file_that_is_no_study_is_one_sentence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert main(["plan", str(path)]) == 1
    assert capsys.readouterr().err == f"error: {path}: It must be a mapping of keys to values.\n"
