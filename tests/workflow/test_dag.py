"""The real Snakefile, planned but not run."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
import yaml
from manifests import manifest
from snakemake.cli import main as snakemake_command
from studies import small_study, tiny_folder

from coppice.results.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
processes = multiprocessing.get_context("fork")
PLUGIN = '''"""A method of another package."""
from pydantic import Field
from coppice.models.replacements import Masked
from coppice.methods.declaration import Source
from coppice.methods.declaration import LayerMethod
from coppice.methods.options import LayerOptions

FAMILY = "prune"


class Options(LayerOptions):
    part: float = Field(default=0.5, description="Part to remove.")


def compress(linear, statistics, options):
    return Masked(linear.weight, linear.weight == linear.weight)


METHOD = LayerMethod(
    source=Source("title", "identifier", "equation"),
    options=Options,
    adds_traits=frozenset({"masked"}),
    compress=compress,
)
'''


def snakemake(directory: Path, *words: str, environment: dict[str, str] | None = None) -> str:
    """What Snakemake prints; an AssertionError with it when it fails."""
    code, printed = finished(directory, *words, environment=environment)
    assert code == 0, printed
    return printed


def finished(directory: Path, *words: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Snakemake's exit code, and what it prints: in a new interpreter where an environment is given, else in a fork.

    A fork of this process need not import Snakemake again, which takes as long as planning a small study.
    """
    command = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(directory), *words]
    with tempfile.TemporaryFile("w+") as printed:
        if environment is None:
            process = processes.Process(target=plan, args=(command, printed))
            process.start()
            process.join()
            code = process.exitcode
        else:
            new = [sys.executable, "-m", "snakemake", *command]
            code = subprocess.run(new, stdout=printed, stderr=printed, env=os.environ | environment).returncode
        printed.seek(0)
        return code, printed.read()


def plan(command: list[str], printed: TextIO) -> None:
    """In a fork: Snakemake with these arguments; whatever it prints goes into a file."""
    for number in (1, 2):
        os.dup2(printed.fileno(), number)
    sys.stdout = sys.stderr = printed
    snakemake_command(command)


def counts(printed: str) -> dict[str, int]:
    """How many jobs of each rule are planned."""
    table = printed.partition("Job stats:")[2].partition("total")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+)\s+(\d+)$", table, re.MULTILINE)}


def commands(printed: str, stage: str) -> list[str]:
    """The shell commands of a stage."""
    return re.findall(rf"^Shell command: (python -m coppice {stage} .*)$", printed, re.MULTILINE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tiny_folder(folder)
    (folder / "study.yaml").write_text(yaml.safe_dump(small_study()))
    return folder


@pytest.fixture(scope="module")
def planned(directory) -> str:
    """The plan of a new interpreter: nothing is imported that the Snakefile does not import itself."""
    words = ["--configfile", str(directory / "study.yaml"), "--dry-run", "--printshellcmds"]
    return snakemake(directory, *words, environment={})


def test_every_shared_job_is_planned_once(planned):
    assert counts(planned) == {
        "study": 1,
        "root": 1,
        "tokenize": 4,
        "calibrate": 3,
        "compress": 7,
        "recover": 3,
        "evaluate": 11,
        "cost": 2,
        "tables": 1,
        "fit": 1,
        "report": 1,
        "track": 1,
        "all": 1,
    }


def test_a_command_names_all_that_it_reads(planned):
    eora = next(line for line in commands(planned, "compress") if "--node tiny/wanda-50/rtn-4/eora-2 " in line)
    assert "--statistics results/small/statistics/tiny/wanda-50/rtn-4/default/moments" in eora
    assert "--reference results/small/models/tiny " in eora
    propagated = next(line for line in commands(planned, "compress") if "--node tiny/shortgpt-1/gptq-4 " in line)
    assert "--tokens results/small/tokens/tiny/calibration.default" in propagated
    assert "--statistics" not in propagated


def test_seeds_and_budgets_reach_the_training(planned):
    lines = {re.search(r"--node (\S+)", line)[1]: line for line in commands(planned, "recover")}
    assert sorted(lines) == ["tiny/shortgpt-1/full-5k", "tiny/shortgpt-1/full-5k@1", "tiny/wanda-50/full-5k"]
    assert "--seed 1 " in lines["tiny/shortgpt-1/full-5k@1"]
    assert "--seed 0 " in lines["tiny/shortgpt-1/full-5k"]
    # 10,000 lies beyond what is trained on.
    assert all("--budgets 1000 " in line for line in lines.values())


def test_a_cost_is_measured_alone(planned):
    threads = {
        re.search(r"--threads (\d+)", line)[1] for line in commands(planned, "evaluate") if "--name cost" in line
    }
    assert threads == {str(os.cpu_count())}


def test_the_world_goes_with_the_evaluation_and_its_nodes_do_not(planned):
    line = next(line for line in commands(planned, "evaluate") if "--name quality" in line)
    assert '"world": {"builtin": "biographies", "people": 50' in line
    assert '"nodes"' not in line
    # An option that is off is not named, so that a new one measures nothing again.
    assert "null" not in line


def test_a_connectivity_reads_a_node_and_its_twin(directory):
    study = small_study()
    protocol = {"own": {"text": "biographies", "length": 32, "windows": 4}}
    study["evaluations"] = {"basin": {"kind": "connectivity", "perplexity": protocol, "points": 5}}
    (directory / "basin.yaml").write_text(yaml.safe_dump(study))
    target = "results/small/evaluations/tiny/shortgpt-1/full-5k@1/basin/metrics.json"
    words = ["--configfile", str(directory / "basin.yaml"), "--dry-run", "--printshellcmds"]
    printed = snakemake(directory, *words, target)
    made = {"root": 1, "tokenize": 4, "calibrate": 1, "compress": 1, "recover": 2, "connectivity": 1}
    assert counts(printed) == made
    [line] = commands(printed, "evaluate")
    assert "--model $(dirname results/small/models/tiny/shortgpt-1/full-5k@1/manifest.json)" in line
    assert "--other results/small/models/tiny/shortgpt-1/full-5k " in line
    assert "--tokens own=results/small/tokens/tiny/evaluation.basin.own" in line
    assert '"points": 5' in line
    # No other node is measured: the quantized ones below cannot be interpolated.
    assert counts(snakemake(directory, *words))["connectivity"] == 1


def test_jobs_ask_for_all_models_and_statistics_that_they_hold(directory, without_messages):
    protocol = {"own": {"text": "biographies", "length": 32, "windows": 4}}
    study = {**small_study(), "study": "large"}
    study["evaluations"] = {
        name: {"kind": kind, "perplexity": protocol} for name, kind in (("basin", "connectivity"), ("own", "quality"))
    }
    (directory / "large.yaml").write_text(yaml.safe_dump(study))
    # What is not made yet is taken to be as large as its root.
    write_root(directory / "results/large")
    words = ["--snakefile", str(without_messages), "--configfile", str(directory / "large.yaml"), "--dry-run"]
    printed = snakemake(directory, *words)
    memory, disk = (
        {output: resources[name] for output, resources in asked(printed).items()} for name in ("mem_mb", "disk_mb")
    )
    evaluations = "results/large/evaluations/tiny/shortgpt-1/full-5k@1"
    own, basin = (f"{evaluations}/{name}/metrics.json" for name in ("own", "basin"))
    # Two models more in float32, another checkpoint, and the room on top.
    assert memory[basin] - memory[own] == pytest.approx(1.3 * (64_000 + 16_000), abs=1_000)
    assert disk[basin] - disk[own] == pytest.approx(1.3 * 16_000, abs=1_000)
    # Whole gigabytes, so that jobs that ask for the same can be one array.
    assert all(megabytes % 1_000 == 0 for found in (memory, disk) for megabytes in found.values())
    models = "results/large/models/tiny"
    wanda, rtn, eora = (
        disk[f"{models}/{node}/manifest.json"] for node in ("wanda-50", "wanda-50/rtn-4", "wanda-50/rtn-4/eora-2")
    )
    # Parent and child; 33 GB of moments for one of 32 blocks; a reference.
    assert rtn == pytest.approx(1.3 * 32_000 + 1_000, abs=1_000)
    assert 16_000 + 33_000 + 16_000 < wanda < 1.5 * (16_000 + 33_000 + 16_000)
    assert eora - wanda == pytest.approx(1.3 * 16_000, abs=1_000)


def test_a_job_that_is_done_again_asks_for_more_memory_and_disk(tmp_path, without_messages):
    tiny_folder(tmp_path)
    study = {**small_study(), "recipes": [["rtn-4"]], "evaluations": {}, "laws": {}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    write_root(tmp_path / "results/small")
    target = "results/small/models/tiny/rtn-4/manifest.json"
    # There are no weights, so that the job fails.
    words = ["--snakefile", str(without_messages), "--configfile", str(tmp_path / "study.yaml"), "--cores", "1"]
    words += ["--retries", "1", target]
    code, printed = finished(tmp_path, *words)
    assert code == 1, printed
    for name in ("mem_mb", "disk_mb"):
        first, second = (int(found) for found in re.findall(rf"resources: .*\b{name}=(\d+)", printed))
        assert second == 2 * first


def write_root(results: Path) -> None:
    """The manifest of a root of 8e9 parameters, in 16 bits and without weights."""
    path = results / "models/tiny/manifest.json"
    path.parent.mkdir(parents=True)
    dense = {"total": 8_030_000_000, "blocks": 6_980_000_000, "decoder_linears": 6_980_000_000}
    parameters = dense | {"nonzero": dense["total"]}
    manifest(parameters=parameters, dense=dense, stored_bytes=16_000_000_000).write(path)


def asked(printed: str) -> dict[str, dict[str, int]]:
    """By the output of a job what numbers it asks for, of jobs that run a model."""
    blocks = re.findall(r"^    output: (\S+)\n(?:.*\n)*?    resources: (.+)$", printed, re.MULTILINE)
    return {
        output: {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)(?=,|$)", resources)}
        for output, resources in blocks
        if "disk_mb" in resources
    }


def test_one_node_plans_what_it_needs_and_no_more(directory):
    target = "results/small/models/tiny/wanda-50/full-5k/manifest.json"
    printed = snakemake(directory, "--configfile", str(directory / "study.yaml"), "--dry-run", target)
    assert counts(printed) == {"root": 1, "tokenize": 3, "calibrate": 1, "compress": 1, "recover": 1}


def test_a_configfile_replaces_the_default_study_and_config_changes_keys(directory, tmp_path):
    (tmp_path / "config").mkdir()
    tiny_folder(tmp_path)
    default = {
        "study": "default",
        "models": {"tiny": {"path": "tiny"}},
        "texts": {"unused": {"builtin": "biographies"}},
    }
    (tmp_path / "config" / "config.yaml").write_text(yaml.safe_dump(default))
    plain = {"study": "own", "models": {"tiny": {"path": "tiny"}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(plain))

    printed = snakemake(tmp_path, "--dry-run", "--printshellcmds", "--config", "seed=5")
    assert "results/default/models/tiny/manifest.json" in printed
    assert "--seed 5" in commands(printed, "root")[0]

    target = "results/own/study.yaml"
    own = ["--configfile", str(tmp_path / "own.yaml"), "--config", "seed=5"]
    snakemake(tmp_path, *own, "--cores", "1", target)
    written = yaml.safe_load((tmp_path / target).read_text())
    assert (written["study"], written["seed"], written["texts"]) == ("own", 5, {})
    assert "Nothing to be done" in snakemake(tmp_path, *own, "--dry-run", target)
    (tmp_path / "own.yaml").write_text("# A comment changes nothing.\n" + yaml.safe_dump(plain))
    assert "Nothing to be done" in snakemake(tmp_path, *own, "--dry-run", target)
    assert counts(snakemake(tmp_path, *own[:-1], "seed=6", "--dry-run", target)) == {"study": 1}


def test_a_broken_study_is_refused_with_its_sentence(directory):
    code, printed = finished(directory, "--configfile", str(directory / "study.yaml"), "--dry-run", "--config", "sed=1")
    assert code != 0
    assert "There is no key 'sed'. Did you mean 'seed'?" in printed


def test_a_changed_method_makes_its_nodes_again_and_no_others(tmp_path):
    tiny_folder(tmp_path)
    (tmp_path / "halving.py").write_text(PLUGIN)
    information = tmp_path / "halving-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: halving\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[coppice.methods]\nhalving = halving\n")
    study = small_study()
    study["steps"] = {"halving": {"method": "halving"}, **study["steps"]}
    study["recipes"] = [["halving", "rtn-4"], ["wanda-50"]]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    words = ["--configfile", str(tmp_path / "study.yaml"), "--rerun-triggers", "mtime"]
    environment = {"PYTHONPATH": str(tmp_path)}

    # The first column of the summary are the outputs; they are made by hand, all as old as each other.
    summary = snakemake(tmp_path, *words, "--summary", environment=environment)
    outputs = [line.split("\t")[0] for line in summary.splitlines() if line.startswith("results/")]
    assert "results/small/models/tiny/halving/rtn-4/manifest.json" in outputs
    now = (tmp_path / "halving.py").stat().st_mtime + 10
    for output in outputs:
        (tmp_path / output).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / output).touch()
        os.utime(tmp_path / output, (now, now))
    assert "Nothing to be done" in snakemake(tmp_path, *words, "--dry-run", environment=environment)

    (tmp_path / "halving.py").write_text(PLUGIN.replace("0.5", "0.4"))
    os.utime(tmp_path / "halving.py", (now + 10, now + 10))
    printed = snakemake(tmp_path, *words, "--dry-run", "--printshellcmds", environment=environment)
    made = {re.search(r"--node (\S+)", line)[1] for line in commands(printed, "compress")}
    assert made == {"tiny/halving", "tiny/halving/rtn-4"}
    assert commands(printed, "calibrate") == commands(printed, "root") == commands(printed, "tokenize") == []


LAWS = {
    "recovery": {"law": "p2"},
    "compression": {"law": "compression"},
    "bits": {"law": "k-bit"},
    "points": {"law": "pruning", "file": "points.csv"},
}
FITTED = ("fit.json", "points.parquet", "samples.parquet", "fit.svg")


def test_a_changed_law_is_fitted_again_and_a_changed_engine_fits_all(
    tmp_path: Path, repository: Path, snakemake: Callable
):
    """A law that rests on another, as that of compression on p2's, changes with it."""
    tiny_folder(tmp_path)
    (tmp_path / "points.csv").touch()
    study = {"study": "small", "models": {"tiny": {"path": "tiny"}}, "laws": LAWS}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    engine = repository / "workflow" / "coppice" / "laws"
    done = ["study.yaml", "models/tiny/manifest.json", *(f"tables/{table}.parquet" for table in SCHEMAS)]
    now = max(file.stat().st_mtime for file in (*engine.rglob("*.py"), tmp_path / "points.csv")) + 10
    for output in done + [f"laws/{law}/{file}" for law in LAWS for file in FITTED]:
        file = tmp_path / "results" / "small" / output
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (now, now))

    def fitted(*changed: Path) -> set[str]:
        """The laws that are planned once these files are newer than their fits."""
        before = [(file, file.stat()) for file in changed]
        try:
            for file in changed:
                os.utime(file, (now + 10, now + 10))
            printed = snakemake(tmp_path, "laws", "--configfile", str(tmp_path / "study.yaml"), "-n", "-p").stdout
        finally:
            for file, was in before:
                os.utime(file, (was.st_atime, was.st_mtime))
        lines = commands(printed, "fit")
        assert counts(printed) == {"fit": len(lines), "laws": 1}
        return {re.search(r"--output \$\(dirname results/small/laws/(\w+)/fit.json\)", line)[1] for line in lines}

    assert fitted(engine / "p2.py", tmp_path / "points.csv") == {"recovery", "compression", "points"}
    assert fitted(engine / "engine" / "held_out.py") == set(LAWS)


def test_the_snakefile_sets_up_and_rules_are_commands():
    assert len((ROOT / "Snakefile").read_text().splitlines()) <= 60
    for file in (ROOT / "rules").glob("*.smk"):
        text = file.read_text()
        assert "lambda" not in text
        assert not re.search(r"^\s+(run|script):", text, re.MULTILINE)
        assert file.name == "common.smk" or not re.search(r"^def ", text, re.MULTILINE)
