"""The job graph of the package against what Snakemake itself plans for the same study."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from demo import cut_demo
from studies import small_study, tiny_folder

from coppice.planning.jobs import Job, JobGraph
from coppice.study.loading import load_study

# Rules that run the command of another stage.
STAGES = {"connectivity": "evaluate", "cost": "evaluate"}


def seeded() -> dict[str, Any]:
    """A study with a connectivity, several seeds, and steps that read windows and references."""
    study = small_study()
    protocol = {"own": {"text": "biographies", "length": 32, "windows": 4}}
    study["evaluations"]["basin"] = {"kind": "connectivity", "perplexity": protocol}
    return study


@pytest.fixture(scope="module", params=[seeded, cut_demo])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tiny_folder(folder)
    (folder / "study.yaml").write_text(yaml.safe_dump(request.param()))
    return folder


def test_the_graph_has_the_outputs_of_snakemakes_summary(
    place: Path, snakemake: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(place, monkeypatch)
    printed = snakemake(place, "--configfile", str(place / "study.yaml"), "--summary").stdout
    rows = [line.split("\t") for line in printed.splitlines() if line.startswith("results/")]
    summary = {output: STAGES.get(rule, rule) for output, _, rule, *_ in rows}
    expected = {f"{results(graph)}/{output}": job.stage for job in graph.jobs for output in job.outputs}
    assert summary == expected


def test_jobs_read_what_snakemake_gives_them(
    place: Path, snakemake: Callable, without_messages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(place, monkeypatch)
    printed = snakemake(
        place, "--snakefile", str(without_messages), "--configfile", str(place / "study.yaml"), "-n"
    ).stdout
    planned = {
        output: set(inputs.split(", ")) if inputs else set()
        for inputs, output in re.findall(r"^(?:    input: (.*)\n)?    output: ([^,\n]+)", printed, re.MULTILINE)
    }
    jobs = {f"{results(graph)}/{job.output}": job for job in graph.jobs}
    assert planned.keys() == jobs.keys()
    for output, job in jobs.items():
        inside = {path for path in planned[output] if path.startswith("results/")}
        assert inside == {f"{results(graph)}/{path}" for path in job.after}, output
        # What lies outside the results: files of models and texts, and the sources of methods and laws.
        assert len(planned[output] - inside) == len({*job.files, *job.sources}), output


def test_every_job_comes_after_what_it_reads(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: set[str] = set()
    for job in graph_of(place, monkeypatch).jobs:
        assert before.issuperset(job.after), job.name
        before.update(job.outputs)


def graph_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> JobGraph:
    monkeypatch.chdir(place)
    return JobGraph(load_study(place / "study.yaml"))


def results(graph: JobGraph) -> str:
    return f"results/{graph.study.study}"


def test_a_job_is_named_by_the_wildcards_of_its_output(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(place, monkeypatch)
    for job in graph.jobs:
        for wildcards in names_of(job):
            assert graph.job(**wildcards) == job


def names_of(job: Job) -> list[dict[str, str]]:
    parts = job.name.split("/")
    match job.stage:
        case "compress" | "recover":
            return [{"parent": "/".join(parts[:-1]), "part": parts[-1]}]
        case "calibrate":
            return [{"node": "/".join(parts[:-2]), "calibration": parts[-2], "kind": parts[-1]}]
        case "evaluate":
            return [{"node": "/".join(parts[:-1]), "evaluation": parts[-1]}]
        case "tokenize":
            return [{"model": parts[0], "use": parts[1]}]
        case "fit":
            return [{"law": job.name}]
        case "root":
            return [{"model": job.name}]
    return []
