"""A study that is killed, interrupted or left without disk at any stage ends with the tables of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from coppice.files import read_json, sha256
from tests.nodes import save_text, save_tokenizer
from tests.tiny import tiny_model

STARTUP = Path(__file__).with_name("startup")
STAGES = ["study", "root", "tokenize", "calibrate", "compress", "recover", "evaluate"]
STAGES += ["tables", "fit", "report", "track"]
TIMES = {"nodes": ["wall_seconds", "peak_memory_bytes"], "curves": ["seconds"]}
NODE = "tiny/wanda-50/full"


def make_study(folder: Path) -> Path:
    """A folder with a tiny model, a text, and a study of one chain through all stages."""
    folder.mkdir()
    tiny_model().save_pretrained(folder / "tiny")
    save_tokenizer(folder / "tiny")
    save_text(folder / "words.txt", documents=120)
    splits = dict.fromkeys(("calibration", "recovery", "validation", "evaluation"), 0.25)
    training = {"text": "words", "validation": "words", "length": 16, "batch_size": 4, "validation_windows": 8}
    study = {
        "study": "disturbed",
        "models": {"tiny": {"path": "tiny"}},
        "texts": {"words": {"path": "words.txt", "splits": splits}},
        "calibrations": {"default": {"text": "words", "windows": 8, "length": 16}},
        "budgets": [640, 1280],
        "steps": {
            "wanda-50": {"method": "wanda", "sparsity": 0.5},
            "full": {"method": "full", **training, "tokens": 2560, "learning_rate": 1e-3},
        },
        "recipes": [["wanda-50", "full"]],
        "evaluations": {
            "quality": {
                "kind": "quality",
                "perplexity": {"words": {"text": "words", "length": 16, "windows": 16}},
                "nodes": [NODE],
            }
        },
        "laws": {"p2": {"law": "p2"}},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder


def results(folder: Path) -> Path:
    return folder / "results" / "disturbed"


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Every table without what is a time."""
    frames = {path.stem: pd.read_parquet(path) for path in (results(folder) / "tables").glob("*.parquet")}
    return {name: frame.drop(columns=TIMES.get(name, [])) for name, frame in frames.items()}


def assert_same_results(folder: Path, undisturbed: Path) -> None:
    found, wanted = tables(folder), tables(undisturbed)
    assert found.keys() == wanted.keys() != set()
    for name in wanted:
        pd.testing.assert_frame_equal(found[name], wanted[name], check_exact=True)
    assert found["failures"].empty
    for file in ("study.yaml", "laws/p2/fit.json"):
        assert (results(folder) / file).read_text() == (results(undisturbed) / file).read_text()
    assert read_json(results(folder) / "tracking/runs.json").keys() == {".", *wanted["nodes"].node}
    leftovers = [path for path in results(folder).rglob("*") if "partial" in path.name]
    assert leftovers == []
    assert not list(results(folder).glob("state/**/*.safetensors"))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of faults, and the environment in which jobs suffer them (see startup/faults.py)."""
    folder = tmp_path_factory.mktemp("faults")
    return folder, {"FAULTS": str(folder), "PYTHONPATH": str(STARTUP)}


@pytest.fixture(scope="module")
def undisturbed(snakemake: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_study(tmp_path_factory.mktemp("undisturbed") / "study")
    done = snakemake(folder, *in_folder(folder))
    assert done.returncode == 0, done.stdout
    return folder


def in_folder(folder: Path) -> list[str]:
    return ["--configfile", str(folder / "study.yaml")]


def test_every_stage_is_killed_and_interrupted_and_run_again(
    snakemake: Callable,
    undisturbed: Path,
    faults: tuple[Path, dict[str, str]],
    forks: dict[str, str],
    tmp_path: Path,
) -> None:
    """The jobs are forks; those of the undisturbed study are new interpreters."""
    folder, (queue, environment) = make_study(tmp_path / "study"), faults
    for stage in STAGES:
        for fault in ("kill", "interrupt"):
            (queue / f"{stage}.{fault}").touch()
    done = snakemake(folder, *in_folder(folder), "--retries", "2", environment=environment | forks)
    assert done.returncode == 0, done.stdout
    assert sorted(queue.glob("*.kill")) == sorted(queue.glob("*.interrupt")) == []
    # Snakemake says of each attempt that it failed, and tries again.
    assert done.stdout.count("Error in rule") >= 2 * len(STAGES)
    assert "Resuming after step 40" in (results(folder) / "logs/recover" / f"{NODE}.log").read_text()
    assert_same_results(folder, undisturbed)


def test_a_whole_run_is_killed_and_interrupted_and_run_again(
    snakemake: Callable,
    snakemake_command: Callable,
    undisturbed: Path,
    faults: tuple[Path, dict[str, str]],
    forks: dict[str, str],
    tmp_path: Path,
) -> None:
    """The job that a signal reaches is a new interpreter, in the process group of Snakemake; those before are forks."""
    folder, (queue, environment) = make_study(tmp_path / "study"), faults

    def disturbed(stage: str, number: int) -> str:
        """What a run prints whose whole process group gets a signal while a stage waits."""
        (queue / f"{stage}.wait").touch()
        command = snakemake_command(folder, *in_folder(folder), environment=environment | forks | {"ALONE": stage})
        process = subprocess.Popen(**command, start_new_session=True)
        deadline = time.monotonic() + 300
        while not (queue / f"{stage}.waits").exists():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, f"{stage} did not begin"
            time.sleep(0.1)
        (queue / f"{stage}.waits").unlink()
        os.killpg(process.pid, number)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode != 0
        return printed

    disturbed("compress", signal.SIGKILL)
    refused = snakemake(folder, *in_folder(folder))
    assert refused.returncode != 0
    assert "--unlock" in refused.stdout
    assert snakemake(folder, *in_folder(folder), "--unlock").returncode == 0

    # The first thing that a recovery puts in place is its state, at the first budget of the ladder.
    disturbed("recover", signal.SIGINT)
    log = (results(folder) / "logs/recover" / f"{NODE}.log").read_text()
    assert log.splitlines()[-1] == "error: Interrupted; run the same command again to go on."
    done = snakemake(folder, *in_folder(folder), environment=forks)
    assert done.returncode == 0, done.stdout
    assert_same_results(folder, undisturbed)


def compress_words(folder: Path) -> list[str]:
    base = results(folder)
    step = '{"name": "wanda-50", "method": "wanda", "options": {"sparsity": 0.5}}'
    return [
        *("compress", "--node", "tiny/wanda-50", "--parent", str(base / "models/tiny"), "--step", step),
        *("--statistics", str(base / "statistics/tiny/default/moments"), "--threads", "1"),
        *("--output", str(base / "models/tiny/wanda-50")),
    ]


def calibrate_words(folder: Path) -> list[str]:
    base = results(folder)
    return [
        *("calibrate", "--model", str(base / "models/tiny"), "--tokens", str(base / "tokens/tiny/calibration.default")),
        *("--kind", "moments", "--threads", "1", "--output", str(base / "statistics/tiny/default/moments")),
    ]


def tokenize_words(folder: Path) -> list[str]:
    text = f'{{"path": "{folder}/words.txt", "splits": {{"calibration": 0.25}}}}'
    output = str(results(folder) / "tokens/tiny/calibration.default")
    return [
        *("tokenize", "--tokenizer", str(results(folder) / "models/tiny"), "--text", text, "--role", "calibration"),
        *("--windows", "8", "--length", "16", "--output", output),
    ]


def tables_words(folder: Path) -> list[str]:
    base = results(folder)
    return ["tables", "--study", str(base / "study.yaml"), "--results", str(base), "--output", str(base / "tables")]


@pytest.mark.parametrize("words", [tokenize_words, calibrate_words, compress_words, tables_words])
def test_a_disk_that_refuses_is_one_sentence_and_loses_nothing(
    undisturbed: Path,
    faults: tuple[Path, dict[str, str]],
    forks: dict[str, str],
    tmp_path: Path,
    words: Callable[[Path], list[str]],
) -> None:
    folder, (queue, environment) = tmp_path / "study", faults
    shutil.copytree(undisturbed, folder)
    output = Path(words(folder)[-1])
    before = {path.name: sha256(path) for path in output.iterdir() if path.is_file()}

    (queue / f"{words(folder)[0]}.full").touch()
    done = coppice(folder, *words(folder), env=os.environ | environment | forks)
    assert done.returncode == 1
    sentences = done.stderr.strip().splitlines()
    assert len(sentences) == 1
    assert sentences[0].startswith(f"error: {output}")
    assert "File too large" in sentences[0]
    after = {path.name: sha256(path) for path in output.iterdir() if path.is_file()}
    assert after == before
    assert not [path for path in output.iterdir() if "partial" in path.name]

    assert coppice(folder, *words(folder), env=os.environ | forks).returncode == 0
    assert_same_results(folder, undisturbed)


def coppice(folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "coppice", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **options)
