"""One recovery in two processes on CPUs (gloo): the curve and the weights of one process, also after one was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import together
import torch
from nodes import gather, make, save_root, save_windows
from safetensors.torch import load_file

from coppice.models.checkpoint import read_manifest

LENGTH = 16
TRAINING = {"text": "a", "validation": "b", "length": LENGTH, "tokens": 480, "batch_size": 4, "learning_rate": 1e-2}
# What another order of sums explains in float32: measured are 8e-7 nats and 6e-7 in a weight.
LOSS, WEIGHT = 2e-6, 2e-5


def job(place: Path, name: str, parent: str, method: str, output: Path, seed: int = 0, **options: Any) -> dict:
    """The arguments of a recovery, as JSON holds them."""
    return {
        "node": f"tiny/{name}",
        "parent": str(place / parent),
        "dense": str(place / "dense"),
        "tokens": str(place / "tokens"),
        "validation": str(place / "validation"),
        "step": {"name": name, "method": method, "options": {**TRAINING, **options}},
        "budgets": [64, 200],
        "seed": seed,
        "state": str(output.with_name(f"{output.name}-state")),
        "output": str(output),
        "state_every": 0.0,
    }


# Of each case the parent, the method and its options. Factors and masked ones come to sharing as they are.
CASES = {
    "masked": ("masked", "full", {"weight_decay": 0.1}),
    "ragged": ("dense", "full", {"micro_batch_size": 1, "gradient_checkpointing": True, "gradient_clip": 0.1}),
    "quantized": ("quantized", "lora", {"rank": 2}),
    "factors": ("factors", "heal", {"parts": "factors"}),
    "tied": ("tied", "full", {}),
    "narrow": ("dense", "full", {"precision": "bfloat16"}),
}
LONG = {"tokens": 1_000, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Roots with and without tied embeddings, three nodes, and windows for them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    dense = save_root(folder / "dense", num_hidden_layers=2)
    save_root(folder / "tied", num_hidden_layers=2, tie_word_embeddings=True)
    moments = gather(dense, save_windows(folder / "calibration", dense), "moments", folder / "moments")
    make(folder / "masked", dense, "wanda", [moments], sparsity=0.5)
    make(folder / "quantized", dense, "rtn", bits=4, group_size=16)
    make(folder / "factors", dense, "svd", keep=0.5)
    save_windows(folder / "tokens", dense, "recovery", LENGTH, pack=False)
    save_windows(folder / "validation", dense, "evaluation", LENGTH, pack=False)
    return folder


def command(arguments: dict) -> list[str]:
    """`coppice recover` in two processes."""
    words = ["--step", json.dumps(arguments["step"]), "--gpus", "2"]
    words += ["--budgets", ",".join(map(str, arguments["budgets"])), "--state-every", "0", "--threads", "2"]
    for name in ("node", "parent", "dense", "tokens", "validation", "state", "output"):
        words += [f"--{name}", arguments[name]]
    return [sys.executable, "-m", "coppice", "recover", "--device", "cpu", *words]


@pytest.fixture(scope="module")
def killed(place: Path) -> dict[str, Any]:
    """What is left of a run of which the second process was killed: exit code, log and seconds until the end."""
    arguments = job(place, "killed", "masked", "full", place / "out" / "killed", **LONG)
    log, state = place / "killed.log", Path(arguments["state"]) / "state.safetensors"
    with log.open("w") as file:
        run = subprocess.Popen(command(arguments), stdout=file, stderr=file, env=together.environment())
    try:
        limit = time.monotonic() + 300
        while not state.exists() and run.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        assert state.exists(), log.read_text()
        ranks = sorted(map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()))
        os.kill(ranks[-1], signal.SIGKILL)
        died = time.monotonic()
        code = run.wait(timeout=60)
        ended = time.monotonic() - died
    finally:
        run.kill()
    for copy in ("one", "two"):
        shutil.copytree(state.parent, place / "out" / f"resumed-{copy}-state")
    return {"code": code, "log": log.read_text(), "seconds": ended, "ranks": ranks, "output": place / "out" / "killed"}


@pytest.fixture(scope="module")
def ran(place: Path, killed: dict[str, Any]) -> Path:
    """The folder of all results: `<case>-one`, `<case>-two`, and the killed run that went on in one and in two."""
    out = place / "out"
    jobs = {
        count: [
            *(
                job(place, name, parent, method, out / f"{name}-{count}", **options)
                for name, (parent, method, options) in CASES.items()
            ),
            job(place, "killed", "masked", "full", out / f"resumed-{count}", **LONG),
        ]
        for count in ("one", "two")
    }
    jobs["one"].append(job(place, "killed", "masked", "full", out / "undisturbed", **LONG))
    together.run(jobs["one"])
    (place / "jobs.json").write_text(json.dumps(jobs["two"]))
    subprocess.run(
        [sys.executable, together.__file__, str(place / "jobs.json")], env=together.environment(), check=True
    )
    return out


def curve(folder: Path) -> list[dict[str, Any]]:
    return parquet.read_table(folder / "curve.parquet").drop(["seconds"]).to_pylist()


def assert_alike(one: Path, two: Path, loss: float = LOSS, weight: float = WEIGHT) -> None:
    rows, others = curve(one), curve(two)
    assert len(rows) == len(others) > 5
    for row, other in zip(rows, others, strict=True):
        assert row == {key: value if value is None else pytest.approx(value, abs=loss) for key, value in other.items()}
    weights, trained = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert weights.keys() == trained.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(trained[name], tensor, rtol=weight, atol=weight)


@pytest.mark.parametrize("name", [name for name in CASES if name != "narrow"])
def test_two_processes_train_as_one_does(ran: Path, name: str) -> None:
    assert_alike(ran / f"{name}-one", ran / f"{name}-two")
    rows = curve(ran / f"{name}-two")
    assert rows[-1]["validation_loss"] != rows[0]["validation_loss"]
    ours, theirs = (read_manifest(ran / f"{name}-{count}") for count in ("one", "two"))
    differ = {"fingerprint", "files", "wall_seconds", "peak_memory_bytes", "recovery", "parameters", "rho_nonzero"}
    assert ours.model_dump(exclude=differ) == theirs.model_dump(exclude=differ)


def test_pruned_entries_stay_zero(place: Path, ran: Path) -> None:
    parent, trained = (load_file(folder / "model.safetensors") for folder in (place / "masked", ran / "masked-two"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(parent[name] == 0, trained[name] == 0)
    assert not torch.equal(parent[name], trained[name])


def test_bfloat16_is_as_near_as_its_rounding(ran: Path) -> None:
    assert_alike(ran / "narrow-one", ran / "narrow-two", loss=2e-2, weight=5e-2)


def test_a_killed_process_ends_the_job_with_a_sentence(killed: dict[str, Any]) -> None:
    assert killed["code"] == 1
    last = killed["log"].strip().splitlines()[-1]
    assert last.startswith("error: Process 2 of 2 was killed by SIGKILL")
    assert last.endswith("run the same command again to resume from the last state.")
    assert killed["seconds"] < 30
    assert not (killed["output"] / "manifest.json").exists()
    assert not any(Path(f"/proc/{rank}").exists() for rank in killed["ranks"])


@pytest.mark.parametrize("count", ["one", "two"])
def test_a_killed_run_resumes_and_ends_as_if_undisturbed(ran: Path, count: str) -> None:
    assert_alike(ran / "undisturbed", ran / f"resumed-{count}")
    assert not (ran / f"resumed-{count}-state").exists()
