"""The state of an interrupted run: what training has changed, and how far it has come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from coppice.errors import UserError
from coppice.files import atomic_write
from coppice.methods.training import distribute_like, full_tensor, trained_parameters
from coppice.records.base import Json
from coppice.recovery import distributed


class Row(TypedDict):
    """One row of a run's curve. train_loss: since the row before. Losses in nats per token; None: not measured."""

    step: int
    tokens: int
    train_loss: float | None
    validation_loss: float | None
    lr: float
    seconds: float
    budget: bool


@dataclass
class Progress:
    """How far a run has come. seconds: of training, without held-out losses and saving.

    loss, targets: the summed loss that is trained and its terms since the last row; rows: the curve so far.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    targets: int = 0
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class StateFile:
    """Trained parameters, optimizer state, a method's own tensors and progress of a run, in one safetensors file.

    Tensors are named `parameter.<parameter>`, `optimizer.<key>.<parameter>` and `method.<name>`; what the optimizer
    keeps that is not a tensor is in the metadata. Of a model that is divided among processes the file holds whole
    tensors, which the first process writes. identity: flat, all that the run's result depends on; a state of another
    identity is refused.
    """

    path: Path
    identity: Json

    def save(self, model: nn.Module, optimizer: Optimizer, progress: Progress, extra: Mapping[str, Tensor]) -> None:
        """Replaces the file. extra: the method's own tensors. Every process must call it."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, dict[str, object]] = {}
        for name, parameter in trained_parameters(model).items():
            tensors[f"parameter.{name}"] = parameter.detach()
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
                else:
                    values.setdefault(name, {})[key] = value
        if not isinstance(extra, Mapping) or not all(isinstance(tensor, Tensor) for tensor in extra.values()):
            raise UserError("The method's `state` did not return a mapping of names to tensors.")
        tensors |= {f"method.{name}": tensor for name, tensor in extra.items()}
        complete = dict(_whole_tensors(tensors))
        if distributed.rank():
            return
        metadata = {"identity": self.identity, "progress": asdict(progress), "optimizer": values}
        with atomic_write(self.path) as temporary:
            save_file(complete, temporary, {key: json.dumps(value) for key, value in metadata.items()})

    def progress(self) -> Progress:
        """Where to resume: at the start without a state. Raises UserError for another run's or a broken one."""
        if not self.path.exists():
            return Progress()
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
        except SafetensorError as error:
            raise UserError(f"{self.path} is broken ({error}); remove it to train from the start.") from error
        saved = json.loads(metadata["identity"])
        keys = sorted(key for key in saved.keys() | self.identity.keys() if saved.get(key) != self.identity.get(key))
        if keys:
            changes = ", ".join(f"{key} (was {saved.get(key)}, is {self.identity.get(key)})" for key in keys)
            raise UserError(
                f"The interrupted run in {self.path.parent} differs from this one in {changes}; remove {self.path} to "
                "train from the start, or undo the change to resume it."
            )
        return Progress(**json.loads(metadata["progress"]))

    def restore_parameters(self, model: nn.Module) -> None:
        """Copies the trained parameters into the model."""
        with safe_open(self.path, framework="pt") as file, torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(file.get_tensor(f"parameter.{name}"))

    def restore_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Gives the optimizer its state for each parameter.

        Tensors of a parameter's shape are divided as it is, and all lie on its device but `step`, which torch's
        optimizers keep on the CPU.
        """
        with safe_open(self.path, framework="pt") as file:
            values = json.loads(file.metadata()["optimizer"])
            keys: dict[str, list[str]] = {}
            for entry in file.keys():  # noqa: SIM118 - the file is not a mapping
                part, _, rest = entry.partition(".")
                if part == "optimizer":
                    key, _, name = rest.partition(".")
                    keys.setdefault(name, []).append(key)
            for name, parameter in trained_parameters(model).items():
                state = values.get(name, {})
                for key in keys.get(name, []):
                    tensor = file.get_tensor(f"optimizer.{key}.{name}")
                    if key != "step":
                        divided = tensor.shape == parameter.shape
                        tensor = distribute_like(tensor, parameter) if divided else tensor.to(parameter.device)
                    state[key] = tensor
                if state:
                    optimizer.state[parameter] = state

    def extra(self) -> dict[str, Tensor]:
        """The method's own tensors, on the CPU."""
        with safe_open(self.path, framework="pt") as file:
            names = [entry.removeprefix("method.") for entry in file.keys() if entry.startswith("method.")]  # noqa: SIM118
            return {name: file.get_tensor(f"method.{name}") for name in names}

    def remove(self) -> None:
        """Removes the file, what a killed save left next to it, and the folder if nothing else is in it."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.exists():
            for leftover in self.path.parent.glob(f".{self.path.name}.*.partial"):
                leftover.unlink()
            if not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()


def _whole_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, gathered one by one, contiguous; of several processes only the first keeps them, on the CPU."""
    for name, tensor in tensors.items():
        complete = full_tensor(tensor)
        if distributed.rank() == 0:
            yield name, (complete.cpu() if distributed.world_size() > 1 else complete).contiguous()
