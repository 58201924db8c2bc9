"""What recovery training is made of: the order of windows, the loss, the state of an interrupted run, the Trainer.

Symbols: W windows of L tokens, B windows a step, S steps.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from coppice.data.windows import Windows
from coppice.errors import UserError
from coppice.files import atomic_write
from coppice.laws.learning_curve import pays_too_little
from coppice.methods.options import RecoverOptions
from coppice.models.modules import mask, weight_matrices
from coppice.recovery import distributed

IGNORED = -100  # label of a position that is no target
ROWS = 100  # rows of train loss in a curve, about
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_SHARE = 0.05  # largest share of the time spent on saving states
# Of a model on tokens and labels as `summed_loss` takes them: summed over the targets.
Loss = Callable[[PreTrainedModel, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BatchSchedule:
    """What a run reads. order: [S, B] indices of windows; tokens: [S] int64, read by the end of each step."""

    order: np.ndarray
    tokens: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.order)


def batch_schedule(sizes: np.ndarray, batch_size: int, tokens: int, seed: int) -> BatchSchedule:
    """Epochs, each a permutation drawn from (seed, epoch), cut into steps until `tokens` have been read.

    sizes: [W] tokens of each window, padding left out. A step may reach over the end of an epoch.
    """
    epochs = math.ceil(tokens / sizes.sum()) + math.ceil(batch_size / len(sizes))
    visited = np.concatenate([np.random.default_rng((seed, epoch)).permutation(len(sizes)) for epoch in range(epochs)])
    order = visited[: len(visited) // batch_size * batch_size].reshape(-1, batch_size)
    read = sizes[order].sum(axis=1).cumsum()
    steps = int(np.searchsorted(read, tokens)) + 1
    return BatchSchedule(order[:steps], read[:steps].astype(np.int64))


def learning_rate(options: RecoverOptions, step: int, steps: int) -> float:
    """Of the step with that index: linear warm-up to options.learning_rate, then constant or half a cosine to zero."""
    warmup = min(steps, math.ceil(options.warmup * steps if options.warmup < 1 else options.warmup))
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    if options.schedule == "constant":
        return options.learning_rate
    return options.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def optimizer(model: nn.Module, options: RecoverOptions) -> torch.optim.AdamW:
    """AdamW over what trains; vectors (biases, norms) do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], options.learning_rate, options.betas)


def in_precision(device: torch.device, precision: str) -> torch.autocast:
    """A context whose products are computed in bfloat16 where that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def summed_loss(model: PreTrainedModel, tokens: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Negative log-likelihood of the labels in nats, summed in float32. tokens, labels: [b, L]; labels are not shifted.

    Padding stands behind a window's tokens and is no target, so that causal attention needs no mask for it.
    """
    with in_precision(tokens.device, precision):
        logits = model(input_ids=tokens, use_cache=False).logits
    predicted = logits[:, :-1].float().flatten(0, 1)
    return nn.functional.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


class WindowData(Dataset):
    """Windows in the order given by `indices`, each with its labels."""

    def __init__(self, windows: Windows, indices: np.ndarray) -> None:
        self.windows, self.indices = windows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        index = self.indices[position]
        tokens = torch.from_numpy(self.windows.tokens[index].astype(np.int64))
        padding = torch.from_numpy(self.windows.documents[index] < 0)
        return {"input_ids": tokens, "labels": tokens.masked_fill(padding, IGNORED)}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[L] each -> [b, L]."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, windows: Windows, batch_size: int, precision: str) -> float:
    """Mean negative log-likelihood of a token in nats, over all targets of the windows.

    batch_size: windows at once on a device; several processes take turns.
    """
    device = next(model.parameters()).device
    data = WindowData(windows, np.arange(len(windows.tokens)))
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(data), batch_size * distributed.count()):
        first = start + batch_size * distributed.rank()
        mine = range(first, min(first + batch_size, len(data)))
        batch = collate([data[i] for i in mine or [0]])
        if not mine:  # all processes call the model equally often: this one's call counts for nothing
            batch["labels"].fill_(IGNORED)
        total += summed_loss(model, batch["input_ids"].to(device), batch["labels"].to(device), precision).item()
        count += int((batch["labels"][:, 1:] != IGNORED).sum())
    model.train(training)
    total, count = distributed.summed((total, count), device)
    return total / count


@dataclass
class Progress:
    """How far a run has come. seconds: of training, without held-out losses and saving.

    loss, targets: the summed loss that is trained and its terms since the last row; rows: the curve so far.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    targets: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class StateFile:
    """Trained tensors, moments and progress of an interrupted run, in one safetensors file.

    identity: flat, all that the run's result depends on. A state of another identity is refused. Of a model that is
    divided among processes it holds whole tensors, which the first process writes.
    """

    path: Path
    identity: dict[str, Any]

    def save(self, model: nn.Module, moments: torch.optim.Optimizer, progress: Progress) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in _trained(model).items():
            parts = {"parameter": parameter.detach(), **{kind: moments.state[parameter][kind] for kind in MOMENTS}}
            for part, tensor in parts.items():
                complete = distributed.whole(tensor)
                if distributed.rank() == 0:
                    tensors[f"{part}.{name}"] = complete.cpu() if distributed.count() > 1 else complete
        if distributed.rank():
            return
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(asdict(progress))}
        with atomic_write(self.path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    def progress(self) -> Progress:
        """Where to go on: at the start where there is no state. Raises UserError for another run's or a broken one."""
        if not self.path.exists():
            return Progress()
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
        except SafetensorError as error:
            raise UserError(f"{self.path} is broken ({error}); remove it to train from the start.") from error
        there = json.loads(metadata["identity"])
        changed = sorted(key for key in there.keys() | self.identity.keys() if there.get(key) != self.identity.get(key))
        if changed:
            listed = ", ".join(f"{key} (was {there.get(key)}, is {self.identity.get(key)})" for key in changed)
            raise UserError(
                f"The interrupted run in {self.path.parent} was another one, by {listed}; remove {self.path} to train "
                "from the start, or undo the change to go on with it."
            )
        return Progress(**json.loads(metadata["progress"]))

    def restore_parameters(self, model: nn.Module) -> None:
        """Copies the trained tensors into the model."""
        with safe_open(self.path, framework="pt") as file, torch.no_grad():
            for name, parameter in _trained(model).items():
                parameter.copy_(file.get_tensor(f"parameter.{name}"))

    def restore_moments(self, model: nn.Module, moments: torch.optim.Optimizer, step: int) -> None:
        """Gives AdamW the moments that it had after `step` steps."""
        with safe_open(self.path, framework="pt") as file:
            for name, parameter in _trained(model).items():
                kept = {moment: distributed.share(file.get_tensor(f"{moment}.{name}"), parameter) for moment in MOMENTS}
                moments.state[parameter] = {"step": torch.tensor(float(step)), **kept}

    def remove(self) -> None:
        """Removes the file, what a killed save left beside it, and the folder where nothing else lies in it."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.exists():
            for leftover in self.path.parent.glob(f".{self.path.name}.*.partial"):
                leftover.unlink()
            if not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Run:
    """A run of recovery: what it reads and reports. validate: the held-out loss of a model, in nats per token."""

    options: RecoverOptions
    course: BatchSchedule
    budgets: tuple[int, ...]
    seed: int
    precision: str
    validate: Callable[[PreTrainedModel], float]
    state: StateFile
    state_every: float

    def tokens(self, step: int) -> int:
        """Read after that many steps."""
        return int(self.course.tokens[step - 1]) if step else 0

    def reaches_budget(self, step: int) -> bool:
        """Whether a budget of the ladder is met by the end of this step, and was not before."""
        return any(self.tokens(step - 1) < budget <= self.tokens(step) for budget in self.budgets)

    def ends_early(self, rows: list[dict[str, Any]]) -> bool:
        """Whether the curve so far says that the rest of the tokens gains at most options.stop_gain.

        A function of the held-out losses alone, so that a resumed run stops where an undisturbed one does.
        """
        measured = [row for row in rows if row["tokens"] and row["validation_loss"] is not None]
        if self.options.stop_gain is None or not measured:
            return False
        tokens, losses = ([row[key] for row in measured] for key in ("tokens", "validation_loss"))
        return pays_too_little(
            np.array(tokens, float), np.array(losses), self.tokens(self.course.steps), self.options.stop_gain
        )


class Journal(TrainerCallback):
    """Keeps a run's curve, measures it at the budgets, and saves its state."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.resumed = progress.step > 0
        self.clock = self.saved_at = time.monotonic()
        self.save_seconds = 0.0

    def observe(self, loss: float, targets: int) -> None:
        """Takes the summed loss of a part of the step under way. Raises UserError when it is not finite."""
        if not math.isfinite(loss):
            raise diverged("loss", loss, self.progress.step + 1, self.run)
        self.progress.loss += loss
        self.progress.targets += targets

    def measure(self, model: PreTrainedModel) -> None:
        """Adds the row of a held-out loss, before training or at a budget."""
        loss = self.run.validate(model)
        if not math.isfinite(loss) and self.progress.step:
            raise diverged("held-out loss", loss, self.progress.step, self.run)
        if not math.isfinite(loss):
            raise UserError(f"The parent's held-out loss is {loss}; look at the step that made it.")
        self.add_row(loss)

    def add_row(self, validation_loss: float | None = None) -> None:
        step, progress, steps = self.progress.step, self.progress, self.run.course.steps
        row = {
            "step": step,
            "tokens": self.run.tokens(step),
            "train_loss": progress.loss / progress.targets if progress.targets else None,
            "validation_loss": validation_loss,
            "lr": learning_rate(self.run.options, step - 1, steps) if step else 0.0,
            "seconds": progress.seconds,
            "budget": self.run.reaches_budget(step) if step else False,
        }
        progress.loss, progress.targets = 0.0, 0
        progress.rows.append(row)
        losses = {"train loss": row["train_loss"], "held-out loss": validation_loss}
        said = [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
        speed = [f"{row['tokens'] / progress.seconds:,.0f} tokens/s"] if progress.seconds else []
        print(f"{row['tokens']:,} of {self.run.tokens(steps):,} tokens: {', '.join(said + speed)}", flush=True)

    def on_train_begin(self, arguments, state, control, model=None, optimizer=None, **_: Any) -> None:
        if self.resumed:
            # Not before: accelerate reloads an optimizer that it wraps, which would put its steps on the GPU.
            self.run.state.restore_moments(model, optimizer, self.progress.step)
        self.clock = self.saved_at = time.monotonic()

    def on_step_begin(self, arguments, state, control, **_: Any) -> None:
        # Dropout is a function of the step, so that a resumed run draws what an undisturbed one draws. The first of
        # several processes draws what one that is alone does.
        spawned = (distributed.rank(),) if distributed.rank() else ()
        source = np.random.SeedSequence((self.run.seed, self.progress.step), spawn_key=spawned)
        torch.manual_seed(int(source.generate_state(1)[0]))

    def on_step_end(self, arguments, state, control, model=None, optimizer=None, **_: Any) -> None:
        progress, steps = self.progress, self.run.course.steps
        progress.step += 1
        progress.seconds += time.monotonic() - self.clock
        measured = progress.step == steps or self.run.reaches_budget(progress.step)
        if measured:
            self.measure(model)
        elif progress.step % math.ceil(steps / ROWS) == 0:
            self.add_row()
        now = time.monotonic()
        pause = max(self.run.state_every, self.save_seconds / STATE_SHARE)
        if measured or distributed.agreed(now - self.saved_at >= pause, model.device):
            self.run.state.save(model, optimizer, progress)
            self.saved_at = time.monotonic()
            self.save_seconds = self.saved_at - now
        if measured and progress.step < steps and self.run.ends_early(progress.rows):
            control.should_training_stop = True
            print(f"Ending early: the rest would gain at most {self.run.options.stop_gain:g} nats/token.", flush=True)
        self.clock = time.monotonic()


def diverged(what: str, loss: float, step: int, run: Run) -> UserError:
    """The error of a run that cannot be gone on with; its state is removed, as it leads here again."""
    if distributed.rank() == 0:
        run.state.remove()
    distributed.wait()
    return UserError(
        f"Training diverged: the {what} is {loss} at step {step} ({run.tokens(step):,} tokens), and nothing was saved; "
        f"lower learning_rate ({run.options.learning_rate:g}), or give it a longer warmup."
    )


class RecoveryTrainer(Trainer):
    """Trainer with the loss of `summed_loss`, or one that a method brings, which it reports to a journal."""

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the targets of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        journal: Journal,
        folder: Path,
        loss: Loss | None,
        kept: list[tuple[nn.Parameter, Tensor]],
    ) -> None:
        self.own_loss, self.kept = loss, kept
        self.journal, run, done = journal, journal.run, journal.progress.step
        options, steps = run.options, run.course.steps
        at_once = windows_at_once(options)
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=options.batch_size // (at_once * distributed.count()),
            # Processes keep a share of a gradient, the whole of it only until the micro-batch ends.
            accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}},
            max_grad_norm=options.gradient_clip,
            activation_checkpointing=options.gradient_checkpointing,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            seed=run.seed,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type != "cpu",
            disable_tqdm=True,
            report_to="none",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
        )
        # As Trainer itself does for models that place themselves: several visible GPUs would multiply the batch.
        arguments._n_gpu = 1
        moments = optimizer(model, options)
        rate = torch.optim.lr_scheduler.LambdaLR(
            moments, lambda step: learning_rate(options, done + step, steps) / options.learning_rate
        )
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=WindowData(windows, run.course.order[done:].flatten()),
            callbacks=[journal],
            optimizers=(moments, rate),
        )
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The summed loss of a micro-batch by the targets of the whole step."""
        tokens, labels, precision = inputs["input_ids"], inputs["labels"], self.journal.run.precision
        if self.own_loss is None:
            loss = summed_loss(model, tokens, labels, precision)
        else:
            with in_precision(tokens.device, precision):
                loss = self.own_loss(model, tokens, labels)
        total, targets = distributed.summed((loss.item(), int((labels[:, 1:] != IGNORED).sum())), loss.device)
        self.journal.observe(total, int(targets))
        # Processes average their gradients, which are to be summed.
        return loss * distributed.count() / num_items_in_batch

    def training_step(self, *given: Any, **named: Any) -> Tensor:
        """As Trainer's; pruned entries of a model that is divided among processes then have no gradient."""
        loss = super().training_step(*given, **named)
        for parameter, kept in self.kept:
            parameter.grad.mul_(kept)
        return loss


def windows_at_once(options: RecoverOptions) -> int:
    """On each of the devices."""
    return options.micro_batch_size or options.batch_size // distributed.count()


def _trained_masks(model: nn.Module) -> dict[str, Tensor]:
    """Those of masked linears whose weights train, by the linear's name.

    Methods hook the gradients of such weights, but dividing a model makes its parameters anew, without hooks.
    """
    trained = {name: linear for name, linear in weight_matrices(model).items() if linear.weight.requires_grad}
    return {name: kept for name, linear in trained.items() if (kept := mask(linear)) is not None}


def train(
    model: PreTrainedModel,
    windows: Windows,
    run: Run,
    folder: Path,
    loss: Loss | None = None,
    device: str = "cpu",
) -> Progress:
    """Trains the model in place, from where the run's state says, and returns the whole curve.

    folder: where the Trainer may write. loss: the method's own, `summed_loss` when None. device: of a model that
    several processes train together, which lies on the CPU; it is divided among them. Raises UserError where the state
    is another run's and where training diverges.
    """
    progress = run.state.progress()
    journal = Journal(run, progress)
    masks = _trained_masks(model) if distributed.count() > 1 else {}
    if progress.step:
        run.state.restore_parameters(model)
    distributed.shard(model, device, run.precision)
    weights = {name: model.get_submodule(name).weight for name in masks}
    kept = [(weight, distributed.share(masks[name], weight)) for name, weight in weights.items()]
    if progress.step:
        print(f"Going on after step {progress.step} ({run.tokens(progress.step):,} tokens).", flush=True)
    else:
        journal.measure(model)
    if progress.step < run.course.steps and not run.ends_early(progress.rows):
        use_cache = model.config.use_cache
        RecoveryTrainer(model, windows, journal, folder, loss, kept).train()
        # Trainer switches it off for good; the model that is saved is to generate as its parent does.
        model.config.use_cache = use_cache
    return progress
