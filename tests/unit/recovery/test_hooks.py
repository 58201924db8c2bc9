"""The whole training contract: a method with a clock, groups, ascent, its own optimizer and its own state."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradual
import pytest
import together
import torch
from nodes import save_root, save_windows
from recoveries import curve, interruption, kill_after_a_state, losses
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from coppice.data.windows import load_windows
from coppice.errors import UserError
from coppice.methods.declaration import Resources
from coppice.methods.registry import methods
from coppice.methods.training import Clock, ParameterGroup, matrices_and_vectors
from coppice.models.checkpoint import load_model, read_manifest
from coppice.recovery.objective import WindowData, collate
from coppice.recovery.schedule import batch_schedule
from coppice.recovery.stage import Recovery, recover
from coppice.recovery.state import Progress, StateFile

OPTIONS = {"text": "a", "validation": "b", "length": 16, "tokens": 640, "batch_size": 4, "learning_rate": 0.05}
OPTIONS |= {"warmup": 0, "gradient_clip": 0.0}
STEPS = 10

# Two processes: a run whose state is copied after its sixth step, then one that resumes from the copy.
TOGETHER = """
import json, shutil, sys
import gradual, together
from coppice.recovery import distributed
from coppice.recovery.state import StateFile

gradual.register()
save = StateFile.save

def save_and_copy(file, model, optimizer, progress, extra):
    save(file, model, optimizer, progress, extra)
    if distributed.rank() == 0 and file.path.parent.name == "two-state" and progress.step == 6:
        shutil.copytree(file.path.parent, file.path.parent.with_name("resumed-state"))

StateFile.save = save_and_copy
together.launch(json.loads(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gradual.register()
    torch.set_num_threads(1)  # child processes are forked; threads of the parent would not follow
    yield
    del methods()["gradual"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    dense = save_root(folder / "dense", num_hidden_layers=2)
    save_windows(folder / "tokens", dense, "recovery")
    save_windows(folder / "validation", dense, "evaluation")
    return folder


def job(place: Path, output: Path, **options: Any) -> dict[str, Any]:
    """The fields of a recovery with a budget, and so a saved state, at the end of every step."""
    inputs = {"parent": "dense", "dense": "dense", "tokens": "tokens", "validation": "validation"}
    return {
        **{field: place / name for field, name in inputs.items()},
        "node": "tiny/gradual",
        "step": {"name": "gradual", "method": "gradual", "options": OPTIONS | options},
        "budgets": tuple(range(64, 641, 64)),
        "state": output.with_name(f"{output.name}-state"),
        "state_every": 0.0,
        "output": output,
    }


def train(place: Path, output: Path, **options: Any) -> dict[str, Any]:
    return recover(Recovery(**job(place, output, **options)))


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    gradual.register()
    train(place, place / "undisturbed")
    return place / "undisturbed"


def assert_same(output: Path, undisturbed: Path) -> None:
    assert losses(output) == losses(undisturbed)
    assert read_manifest(output).fingerprint == read_manifest(undisturbed).fingerprint


def test_hooks_groups_and_optimizer_are_those_of_a_loop_by_hand(place: Path, undisturbed: Path) -> None:
    options = gradual.Options(**OPTIONS)
    model = gradual.prepare(load_model(place / "dense"), options)
    norm = model.model.norm.weight
    before = norm.detach().clone()
    others = [parameter for parameter in model.parameters() if parameter is not norm]
    momenta = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    windows = load_windows(place / "tokens")
    schedule = batch_schedule((windows.documents >= 0).sum(axis=1), 4, 640, 0)
    assert schedule.steps == STEPS
    data = WindowData(windows, schedule.order.flatten())
    for step in range(STEPS):
        clock = Clock(step + 1, STEPS, int(schedule.tokens[step]), 0, options)
        with torch.no_grad():
            gradual.before_step(model, clock)
        batch = collate([data[4 * step + index] for index in range(4)])
        model(**batch).loss.backward()
        with torch.no_grad():
            for parameter in others:
                momenta[parameter].mul_(0.9).add_(parameter.grad + 0.01 * parameter)
                parameter -= 0.05 * momenta[parameter]
            momenta[norm].mul_(0.9).add_(norm.grad)
            norm += 0.005 * momenta[norm]
            gradual.after_step(model, clock)
        model.zero_grad()
    assert (norm - before).abs().max() > 1e-4
    for name, weight in load_file(undisturbed / "model.safetensors").items():
        torch.testing.assert_close(weight, model.state_dict()[name].detach(), rtol=1e-4, atol=1e-6)


def test_the_node_is_pruned_as_the_clock_said(undisturbed: Path) -> None:
    model = load_model(undisturbed)
    for linear in gradual.pruned_linears(model).values():
        assert linear.masked
        assert (linear.weight == 0).float().mean() == 0.5
    assert read_manifest(undisturbed).traits == ["masked"]
    assert not undisturbed.with_name("undisturbed-state").exists()


def test_a_run_interrupted_at_each_third_step_ends_as_if_undisturbed(place, undisturbed, tmp_path, capfd) -> None:
    for step in (3, 6, 9):
        with interruption(after=step):
            train(place, tmp_path / "node")
    train(place, tmp_path / "node")
    output = capfd.readouterr().out
    assert [step for step in range(1, 11) if f"Resuming after step {step} " in output] == [3, 6, 9]
    assert_same(tmp_path / "node", undisturbed)


def test_a_killed_run_ends_as_if_undisturbed(place, undisturbed, tmp_path, capfd) -> None:
    kill_after_a_state(lambda: train(place, tmp_path / "node"), tmp_path / "node-state" / "state.safetensors")
    train(place, tmp_path / "node")
    assert "Resuming after step" in capfd.readouterr().out
    assert_same(tmp_path / "node", undisturbed)


def test_without_its_own_state_the_resumed_run_would_be_another(place, undisturbed, tmp_path, monkeypatch) -> None:
    forgetful = replace(gradual.METHOD, state=None, restore=None)
    monkeypatch.setitem(methods(), "gradual", replace(methods()["gradual"], declaration=forgetful))
    with interruption(after=6):
        train(place, tmp_path / "node")
    train(place, tmp_path / "node")
    assert losses(tmp_path / "node") != losses(undisturbed)


def test_two_processes_resume_to_the_bit_and_train_as_one_does(place: Path, undisturbed: Path) -> None:
    jobs = json.dumps([job(place, place / name) for name in ("two", "resumed")], default=str)
    command = [sys.executable, "-c", TOGETHER, jobs]
    run = subprocess.run(command, env=together.environment(), check=True, stdout=subprocess.PIPE, text=True)
    assert run.stdout.count("Resuming after step 6 ") == 1
    assert_same(place / "resumed", place / "two")
    rows, others = curve(undisturbed), curve(place / "two")
    assert [row["validation_loss"] for row in rows] == [
        pytest.approx(row["validation_loss"], abs=2e-6) for row in others
    ]
    weights = load_file(place / "two" / "model.safetensors")
    for name, weight in load_file(undisturbed / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=2e-5, atol=2e-5)


class Projected(torch.optim.Optimizer):
    """Its state has a tensor of another shape than the parameter's, one of another type, and plain values."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["projection"] = parameter.detach()[:1].double() * 2
            state["signs"] = parameter.detach() > 0
            state["count"] = state.get("count", 0) + 1
            state["scale"] = None


def test_a_state_holds_whatever_the_optimizer_keeps(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = Projected(list(model.parameters()))
    optimizer.step()
    state = StateFile(tmp_path / "state.safetensors", {})
    state.save(model, optimizer, Progress(step=1), {"own": torch.tensor([3])})
    restored = Projected(list(other.parameters()))
    state.restore_parameters(other)
    state.restore_optimizer(other, restored)
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, twin)
        assert optimizer.state[parameter].keys() == restored.state[twin].keys()
        for key, value in optimizer.state[parameter].items():
            again = restored.state[twin][key]
            assert type(again) is type(value)
            assert (
                torch.equal(again, value) and again.dtype == value.dtype if torch.is_tensor(value) else again == value
            )
    assert state.extra() == {"own": torch.tensor([3])}


def test_a_state_has_the_momenta_and_the_methods_tensors(place: Path, tmp_path: Path) -> None:
    with interruption(after=4):
        train(place, tmp_path / "node")
    with safe_open(tmp_path / "node-state" / "state.safetensors", "pt") as file:
        names = set(file.keys())
    parameter = "model.layers.0.mlp.down_proj.weight"
    assert {f"parameter.{parameter}", f"optimizer.momentum_buffer.{parameter}", "method.prunings"} <= names
    assert "method.0.mlp.down_proj" in names
    assert not any("exp_avg" in name for name in names)


def test_a_parameter_in_no_group_is_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def matrices(model: Any, options: Any) -> list[ParameterGroup]:
        return matrices_and_vectors(model, options)[:1]

    partial = replace(gradual.METHOD, parameter_groups=matrices)
    monkeypatch.setitem(methods(), "gradual", replace(methods()["gradual"], declaration=partial))
    with pytest.raises(UserError, match=r"input_layernorm.weight requires a gradient, but is in none of the method's"):
        train(place, tmp_path / "node")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"restore": None}, "`state` and `restore` belong together"),
        ({"resources": Resources(reach="model", teacher=True)}, "names a teacher, but no `loss`"),
        ({"before_step": lambda model: None}, "`before_step` does not take the 2 arguments"),
        ({"after_step": 3}, "`after_step` is 3, not a function"),
        ({"finish": lambda model: model}, "`finish` does not take the 2 arguments"),
        ({"parameter_groups": None}, "`parameter_groups` is None, not a function"),
        ({"optimizer": "sgd"}, "`optimizer` is 'sgd', not a function"),
    ],
)
def test_a_broken_contract_is_refused_when_it_is_declared(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        replace(gradual.METHOD, **change)


@pytest.mark.parametrize("extra", [3, [torch.ones(1)], {"buffer": 3}], ids=["number", "list", "number by name"])
def test_a_state_that_is_no_mapping_of_tensors_is_refused(extra: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    file = StateFile(tmp_path / "state.safetensors", {})
    with pytest.raises(UserError, match="The method's `state` did not return a mapping of names to tensors"):
        file.save(model, torch.optim.AdamW(model.parameters()), Progress(), extra)
    assert not (tmp_path / "state.safetensors").exists()
