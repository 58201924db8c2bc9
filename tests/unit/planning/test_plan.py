"""What a study will take: its jobs, the sizes of what is not made yet, times from benchmarks, and what will not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from manifests import metrics, token_set

from coppice.cli import main
from coppice.errors import UserError
from coppice.evaluation import roofline
from coppice.hardware import DEVICES
from coppice.planning import stage, times
from coppice.planning.jobs import Job, JobGraph
from coppice.planning.resources import LIBRARIES
from coppice.planning.sizes import Size, node_sizes
from coppice.planning.stage import plan
from coppice.planning.text import lines
from coppice.planning.work import SizedJob, sized_jobs
from coppice.records.layout import ResultsLayout
from coppice.study import tree
from coppice.study.loading import load_study
from coppice.study.schema import SHIPPED, Study

GRID = {"method": "rtn", "bits": 4, "group_size": 32}
TEXTS = {"text": "lives", "validation": "lives", "length": 32, "validation_windows": 4, "batch_size": 4}


def study(**changes: Any) -> Study:
    """One shipped model, a tree of seven nodes."""
    value = {
        "study": "small",
        "models": {"tiny": {"shipped": "bio-tiny"}},
        "texts": {"lives": {"builtin": "biographies", "people": 50}},
        "calibrations": {"default": {"text": "lives", "windows": 4, "length": 32}},
        "steps": {
            "wanda-50": {"method": "wanda", "sparsity": 0.5},
            "svd-50": {"method": "svd", "keep": 0.5},
            "rtn-4": GRID,
            "full": {"method": "full", **TEXTS, "tokens": 5_000},
        },
        "recipes": [["wanda-50", "full"], ["wanda-50", "rtn-4"], ["svd-50", "full"], ["rtn-4"]],
        "evaluations": {
            "quality": {
                "kind": "quality",
                "perplexity": {"own": {"text": "lives", "length": 32, "windows": 4}},
                "nodes": ["*/full", "tiny"],
            }
        },
        "laws": {"p2": {"law": "p2"}},
    }
    return load_study({**value, **changes})


def machine(**changes: Any) -> dict[str, Any]:
    return {"cores": 2, "gpus": 0, "device": None, "memory": 64e9, "disk": 1e12, **changes}


def sizes_of(value: Study) -> dict[str, Any]:
    return node_sizes(value, Path("nowhere"))


def finish(results: Path, job: Job, seconds: float | None = None, memory: float = 500.0) -> None:
    """The output of a job, and its benchmark."""
    path = results / job.output
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    if seconds is not None:
        log = results / "benchmarks" / job.stage / f"{job.name}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps({"s": seconds, "max_rss": memory}) + "\n")


def test_every_job_once_with_what_it_reads() -> None:
    value = study()
    found = sized_jobs(JobGraph(value), sizes_of(value))
    # By hand: statistics of the dense model for wanda; windows for it, for two parts of the recovery, for the protocol.
    assert Counter(job.stage for job in found) == {
        **dict.fromkeys(("study", "root", "calibrate", "tables", "fit", "report", "track"), 1),
        **{"tokenize": 4, "compress": 4, "recover": 2, "evaluate": 3},
    }
    assert len({job.output for job in found}) == len(found)
    by_output = {job.output: job for job in found}
    outputs = {output for job in found for output in job.outputs}
    assert all(read in outputs for job in found for read in job.after)
    wanda = by_output["models/tiny/wanda-50/manifest.json"]
    assert set(wanda.after) == {
        "models/tiny/manifest.json",
        "statistics/tiny/default/moments/manifest.json",
    }


def test_sizes_before_anything_is_made() -> None:
    sizes = sizes_of(study())
    tiny = sizes["tiny"]
    folder = SHIPPED / "bio-tiny"
    # The headers of the weights, by hand: the file less its header of text.
    assert tiny.stored == (folder / "model.safetensors").stat().st_size
    assert 0 < tiny.stored - 2 * tiny.parameters < 20_000
    assert sizes["tiny/wanda-50"].stored == tiny.stored
    assert sizes["tiny/svd-50"].linears == pytest.approx(tiny.linears / 2)
    assert sizes["tiny/svd-50"].stored == pytest.approx(tiny.stored - tiny.linear_bytes / 2)
    # 4 bits, and in each group of 32 a scale of 16 bits and a zero point of 4.
    assert sizes["tiny/rtn-4"].linear_bytes == pytest.approx(tiny.linears * (4 + 20 / 32) / 8, rel=0.02)
    assert sizes["tiny/rtn-4"].how == "estimated"
    few = study(steps={"rtn-4": {**GRID, "target_modules": ["q_proj"]}}, recipes=[["rtn-4"]], evaluations={}, laws={})
    assert sizes_of(few)["tiny/rtn-4"] == tiny._replace(how="at most")


def test_a_model_of_the_hub_is_unknown(tmp_path: Path) -> None:
    hub = {"hub": "nobody/has-this", "revision": "0" * 40}
    value = study(models={"tiny": {"shipped": "bio-tiny"}, "far": hub})
    made = plan(value, tmp_path, machine())
    assert made["unknown"] == [{"model": "far", **hub}]
    assert made["total"]["elapsed_seconds"] is None
    recover = next(row for row in made["stages"] if row["stage"] == "recover")
    assert (recover["left"], recover["unknown"]) == (4, 2)
    text = "\n".join(lines(made))
    assert f"  hf download nobody/has-this config.json --revision {'0' * 40}" in text.splitlines()
    assert text.endswith("What is known fits.")
    [recover] = [line for line in text.splitlines() if line.startswith("recover ")]
    assert " + ?" in recover
    assert max(map(len, text.splitlines())) <= 120


def test_what_is_done_is_not_planned(tmp_path: Path) -> None:
    value = study()
    found = {job.output: job for job in sized_jobs(JobGraph(value), sizes_of(value))}
    before = plan(value, tmp_path, machine())
    finish(tmp_path, found["evaluations/tiny/quality/metrics.json"])
    finish(tmp_path, found["tokens/tiny/recovery.full/manifest.json"])
    layout = ResultsLayout(tmp_path)
    options = value.evaluations["quality"].model_dump(mode="json", exclude={"nodes", "world"})
    metrics(options=options).write(layout.metrics("tiny", "quality"))
    token_set(text=value.texts["lives"].model_dump(mode="json")).write(layout.tokens("tiny", "recovery.full"))
    made = plan(value, tmp_path, machine())
    assert before["total"]["left"] - made["total"]["left"] == 2
    assert made["evaluations"] == {"done": 1, "total": 3}
    assert made["total"]["seconds"][1] < before["total"]["seconds"][1]
    assert made["total"]["disk_bytes"] < before["total"]["disk_bytes"]


def record(operations: float, seconds: float) -> times.Record:
    return times.Record("full", operations, seconds, 2e9, 1e9)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0, 10), (100, 30), (200, 50)], (10, 0.2)),
        ([(10, 7), (10, 9), (10, 8)], (8, 0)),  # all alike: no slope
        ([(1, 30), (2, 20), (3, 10)], (20, 0)),  # a falling line is none
        ([(100, 1), (200, 3)], (0, 2 / 150)),  # nothing takes less than no time
    ],
)
def test_line_through_benchmarks(points: list[tuple[float, float]], expected: tuple[float, float]) -> None:
    assert times.line([record(*point) for point in points]) == pytest.approx(expected)


def test_times_scale_from_benchmarks(tmp_path: Path) -> None:
    value = study()
    sizes = sizes_of(value)
    found = sized_jobs(JobGraph(value), sizes)
    job = next(job for job in found if job.stage == "recover")
    assert times.seconds_range(job, sizes, {}, None).low >= times.START_OF_MODELS / 2
    assert job.operations > 0
    works = [job.operations * share for share in (0.5, 1, 1.5)]
    records = {"recover": [record(work, 5 + 20 * work / job.operations) for work in works]}
    low, high = times.seconds_range(job, sizes, records, None)
    assert (low, high) == pytest.approx((25 / times.SURE, 25 * times.SURE))
    # Ten times the tokens lie beyond what was measured: twice the range.
    low, high = times.seconds_range(replace(job, operations=10 * job.operations), sizes, records, None)
    assert (low, high) == pytest.approx((205 / times.SURE / 2, 205 * times.SURE * 2))
    # The benchmarks held twice what was expected of them.
    low, high = times.memory_range(job, sizes, records)
    assert low * high == pytest.approx((2 * times.expected_memory(job, sizes)) ** 2)


def test_benchmarks_are_read_where_jobs_left_them(tmp_path: Path) -> None:
    value = study()
    sizes = sizes_of(value)
    found = sized_jobs(JobGraph(value), sizes)
    finish(tmp_path, next(job for job in found if job.name == "tiny/wanda-50"), 12.5, 400)
    finish(tmp_path, next(job for job in found if job.stage == "tokenize"), 0.4, "NA")
    records = times.benchmarks(found, sizes, tmp_path)
    assert [(row.kind, row.seconds, row.memory) for row in records["compress"]] == [("wanda", 12.5, 400 * 2**20)]
    assert [row.memory for row in records["tokenize"]] == [0]


def test_a_gpu_is_faster_and_its_hours_are_counted() -> None:
    shape = roofline.Shape(4096, 11008, 32, 32, 32, 128, 32_000)
    size = Size(shape, 32, 6.7e9, 6.5e9, 13e9, 13.4e9, "measured")
    rate = times.operations_per_second(size, DEVICES["H100-SXM"])
    # By hand: long prompts are bound by the peak, of which a share is reached; attention takes some of it.
    assert rate == pytest.approx(times.EFFICIENCY * 989.5e12, rel=0.15)
    assert rate > 1000 * times.operations_per_second(size, None)
    made = plan(study(), Path("nowhere"), machine(gpus=1, device="H100-SXM"))
    recover = next(row for row in made["stages"] if row["stage"] == "recover")
    assert recover["gpu_hours"] == pytest.approx([seconds / 3600 for seconds in recover["seconds"]])
    assert "GPU hours" in "\n".join(lines(made))


def test_jobs_side_by_side() -> None:
    def job(name: str, *after: str, alone: bool = False, gpus: int = 1) -> SizedJob:
        return SizedJob("recover", name, (name,), {"inputs": after}, alone=alone, gpus=gpus)

    left = [job("a"), job("b"), job("c", "a"), job("d", "b", alone=True), job("e", "done before")]
    seconds = {"a": 3, "b": 1, "c": 2, "d": 4, "e": 1}
    # Two cores: a and b, then e from 1 to 2; c waits for a until 3 and ends at 5; d needs both cores: 5 to 9.
    assert times.makespan(left, seconds, machine()) == 9
    assert times.makespan(left, seconds, machine(cores=1)) == 11
    # One GPU: a recovery after the other.
    assert times.makespan(left, seconds, machine(cores=8, gpus=1)) == 11
    # Two GPUs: one job takes both; one that requests more than the machine has gets them all.
    for asked in (2, 3):
        pair = [job("a", gpus=asked), job("b"), job("c")]
        assert times.makespan(pair, {"a": 3, "b": 1, "c": 2}, machine(cores=8, gpus=2)) == 5


def test_what_will_not_fit(tmp_path: Path) -> None:
    value = study()
    assert plan(value, tmp_path, machine())["problems"] == []
    [sentence] = plan(value, tmp_path, machine(memory=0.3e9))["problems"]
    assert "of the jobs that are left need more than the 0.30 GB of this machine" in sentence
    [sentence] = plan(value, tmp_path, machine(memory=1.0e9))["problems"]
    assert "largest jobs at once may hold" in sentence
    [sentence] = plan(value, tmp_path, machine(disk=1e5))["problems"]
    assert sentence.startswith("Disk: the results will take about")


def test_several_gpus_for_a_job(tmp_path: Path) -> None:
    one, four = (study(steps=steps_with(gpus)) for gpus in (1, 4))
    h200 = {"gpus": 4, "device": "H200"}
    assert plan(four, tmp_path, machine(**h200))["problems"] == []
    single, several = (
        next(row for row in plan(value, tmp_path, machine(**h200))["stages"] if row["stage"] == "recover")
        for value in (one, four)
    )
    # The work is divided and the start is not: four GPUs end sooner and are held longer in all.
    assert several["seconds"][0] < single["seconds"][0]
    assert several["gpu_hours"][0] == pytest.approx(4 * several["seconds"][0] / 3600)
    [sentence] = plan(four, tmp_path, machine(gpus=2, device="H200"))["problems"]
    assert sentence.startswith("GPUs: recover tiny/wanda-50/full requests 4, and the machine has 2;")


def steps_with(gpus: int) -> dict[str, Any]:
    """The steps of the study, where the recovery is long and divided."""
    recovery = {"method": "full", **TEXTS, "tokens": 5_000_000_000, "gpus": gpus}
    return {
        "wanda-50": {"method": "wanda", "sparsity": 0.5},
        "svd-50": {"method": "svd", "keep": 0.5},
        "rtn-4": GRID,
        "full": recovery,
    }


def test_what_a_gpu_does_not_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(stage.GPU_MEMORY, "H200", 1e6)
    [sentence] = plan(study(), tmp_path, machine(gpus=1, device="H200"))["problems"]
    assert sentence.startswith("GPU memory: ")
    assert "on a GPU, and H200 has 1.0 MB" in sentence


def test_what_processes_load_is_on_the_host_and_on_no_gpu() -> None:
    value = study(steps={**steps_with(8), "full": {**steps_with(8)["full"], "method": "lora", "batch_size": 8}})
    # As wide as the shipped model, and with as many parameters as one that several GPUs are for.
    sizes = {
        name: size._replace(parameters=8e9, linears=7e9, linear_bytes=14e9, stored=16e9)
        for name, size in sizes_of(value).items()
    }
    recover = next(job for job in sized_jobs(JobGraph(value), sizes) if job.stage == "recover")
    assert recover.gpus == 8
    # 4 bytes a parameter in each of the eight processes.
    assert times.expected_memory(recover, sizes) > 8 * 4 * 8e9
    # An eighth of the model, of the dense root, of the checkpoint; and what a batch leaves of itself.
    assert (4 + 4 + 2) * 8e9 / 8 < times.gpu_memory(recover, sizes) < 1.1 * (4 + 4 + 2) * 8e9 / 8


def test_a_connectivity_is_expected_to_hold_three_models() -> None:
    protocol = {"own": {"text": "lives", "length": 32, "windows": 4}}
    evaluations = {
        "basin": {"kind": "connectivity", "perplexity": protocol, "nodes": ["tiny/wanda-50/full@1"]},
        "quality": {"kind": "quality", "perplexity": protocol, "nodes": ["tiny/wanda-50/full@1"]},
    }
    value = study(recipes=[{"product": [["wanda-50"], ["full"]], "seeds": [0, 1]}], evaluations=evaluations, laws={})
    sizes = sizes_of(value)
    held = {
        job.kind: times.expected_memory(job, sizes)
        for job in sized_jobs(JobGraph(value), sizes)
        if job.stage == "evaluate"
    }
    size = sizes["tiny/wanda-50/full@1"]
    assert held["basin"] - held["quality"] == pytest.approx(8 * size.parameters + size.stored, abs=1)
    assert held["quality"] > LIBRARIES["evaluate"]


def test_statistics_take_four_bytes_for_every_second_moment() -> None:
    value = study()
    sizes = sizes_of(value)
    [calibrate] = [job for job in sized_jobs(JobGraph(value), sizes) if job.stage == "calibrate"]
    shape, layers = sizes["tiny"].shape, sizes["tiny"].layers
    # Four distinct inputs of a block: three as wide as the hidden states, one with all neurons; 4 bytes an entry.
    assert calibrate.disk == layers * 4 * (3 * shape.hidden**2 + shape.intermediate**2)


def test_gpus_without_a_name_say_nothing_of_times(tmp_path: Path) -> None:
    value = study()
    with pytest.raises(UserError, match=r"--gpus 1: which\?.*pass --device"):
        plan(value, tmp_path, machine(gpus=1))
    # Once every stage that runs on them was measured, a name is not needed.
    found = sized_jobs(JobGraph(value), sizes_of(value))
    for name in ("calibrate", "compress", "recover", "evaluate"):
        job = next(job for job in found if job.stage == name)
        finish(tmp_path, job, 10)
        (tmp_path / job.output).unlink()
    assert plan(value, tmp_path, machine(gpus=1))["total"]["gpu_hours"][0] > 0


def test_the_command_prints_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"study": "s", "models": {"tiny": {"shipped": "bio-tiny"}}, "steps": {"rtn-4": GRID}}))
    words = ["plan", str(path), "--results", str(tmp_path / "results"), "--memory", "16", "--disk", "10"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("Study s: 1 node, 0 evaluations, 0 laws; ")
    assert "Snakemake itself decides by content: `snakemake -n`" in " ".join(text.split())
    assert "Everything fits." in text
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["memory"] == 16e9
    assert main([*words, "--device", "H10O-SXM"]) == 1
    assert "Did you mean 'H100-SXM'?" in capsys.readouterr().err
    for wrong in (["--memory", "0"], ["--disk", "-3"], ["--gpus", "-1"], ["--results", str(path)]):
        assert main([*words, *wrong]) == 1
        assert f"error: {wrong[0]}" in capsys.readouterr().err


def test_nothing_heavy_is_imported() -> None:
    modules = "coppice.planning.stage, coppice.planning.resources, snakemake_logger_plugin_coppice"
    script = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert not {"torch", "transformers", "pyarrow", "pandas", "scipy"} & set(done.stdout.split())


def test_nodes_are_those_of_the_tree(tmp_path: Path) -> None:
    value = study()
    assert [row["node"] for row in plan(value, tmp_path, machine())["nodes"]] == list(tree.nodes(value))
