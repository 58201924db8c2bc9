"""A run, and the journal that it keeps: its curve, its held-out losses, and its state on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coppice.errors import UserError
from coppice.laws.learning_curve import pays_too_little
from coppice.methods.declaration import TrainingMethod
from coppice.methods.options import RecoverOptions
from coppice.recovery import distributed
from coppice.recovery.schedule import BatchSchedule, learning_rate
from coppice.recovery.state import Progress, Row, StateFile

ROWS = 100  # rows of train loss in a curve, about
STATE_SHARE = 0.05  # largest share of the time spent on saving states


@dataclass(frozen=True)
class Run:
    """A run of recovery: what it reads and reports. validate: the held-out loss of a model, in nats per token."""

    method: TrainingMethod
    options: RecoverOptions
    schedule: BatchSchedule
    budgets: tuple[int, ...]
    seed: int
    precision: str
    validate: Callable[[PreTrainedModel], float]
    state: StateFile
    state_every: float

    def tokens(self, step: int) -> int:
        """Read after that many steps."""
        return int(self.schedule.tokens[step - 1]) if step else 0

    def reaches_budget(self, step: int) -> bool:
        """Whether a budget of the ladder is met by the end of this step, and was not before."""
        return any(self.tokens(step - 1) < budget <= self.tokens(step) for budget in self.budgets)

    def ends_early(self, rows: list[Row]) -> bool:
        """Whether the curve so far predicts that the rest of the tokens gains at most options.stop_gain.

        A function of the held-out losses alone, so that a resumed run stops where an undisturbed one does.
        """
        measured = [row for row in rows if row["tokens"] and row["validation_loss"] is not None]
        if self.options.stop_gain is None or not measured:
            return False
        tokens = np.array([row["tokens"] for row in measured], float)
        losses = np.array([row["validation_loss"] for row in measured])
        return pays_too_little(tokens, losses, self.tokens(self.schedule.steps), self.options.stop_gain)

    @torch.no_grad()
    def extra_state(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The method's own tensors, for the state."""
        return self.method.state(model) if self.method.state else {}

    @torch.no_grad()
    def restore(self, model: PreTrainedModel) -> None:
        """Restores the saved parameters and the method's own tensors in a prepared, undivided model."""
        self.state.restore_parameters(model)
        if self.method.restore:
            self.method.restore(model, self.state.extra())


class Journal(TrainerCallback):
    """Keeps a run's curve, measures held-out losses at the budgets, and saves the run's state."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.resumed = progress.step > 0
        self.step_began = self.saved_at = time.monotonic()
        self.save_seconds = 0.0

    def observe(self, loss: float, targets: int) -> None:
        """Takes the summed loss of a part of the current step. Raises UserError when it is not finite."""
        if not math.isfinite(loss):
            raise divergence_error("loss", loss, self.progress.step + 1, self.run)
        self.progress.loss += loss
        self.progress.targets += targets

    def measure(self, model: PreTrainedModel) -> None:
        """Adds the row of a held-out loss, before training or at a budget."""
        loss = self.run.validate(model)
        if not math.isfinite(loss) and self.progress.step:
            raise divergence_error("held-out loss", loss, self.progress.step, self.run)
        if not math.isfinite(loss):
            raise UserError(f"The parent's held-out loss is {loss}; check the step that produced it.")
        self.add_row(loss)

    def add_row(self, validation_loss: float | None = None) -> None:
        """Adds a row to the curve and prints it."""
        step, progress, steps = self.progress.step, self.progress, self.run.schedule.steps
        row = Row(
            step=step,
            tokens=self.run.tokens(step),
            train_loss=progress.loss / progress.targets if progress.targets else None,
            validation_loss=validation_loss,
            lr=learning_rate(self.run.options, step - 1, steps) if step else 0.0,
            seconds=progress.seconds,
            budget=self.run.reaches_budget(step) if step else False,
        )
        progress.loss, progress.targets = 0.0, 0
        progress.rows.append(row)
        losses = {"train loss": row["train_loss"], "held-out loss": validation_loss}
        parts = [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
        if progress.seconds:
            parts.append(f"{row['tokens'] / progress.seconds:,.0f} tokens/s")
        print(f"{row['tokens']:,} of {self.run.tokens(steps):,} tokens: {', '.join(parts)}", flush=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resumed:
            # Not before: accelerate reloads an optimizer that it wraps, which would put its steps on the GPU.
            self.run.state.restore_optimizer(kwargs["model"], kwargs["optimizer"])
        self.step_began = self.saved_at = time.monotonic()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Dropout is a function of the step, so that a resumed run draws what an undisturbed one draws. The first of
        # several processes draws what a single one does.
        spawn_key = (distributed.rank(),) if distributed.rank() else ()
        source = np.random.SeedSequence((self.run.seed, self.progress.step), spawn_key=spawn_key)
        torch.manual_seed(int(source.generate_state(1)[0]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: PreTrainedModel = kwargs["model"]
        progress, steps = self.progress, self.run.schedule.steps
        progress.step += 1
        progress.seconds += time.monotonic() - self.step_began
        at_budget = progress.step == steps or self.run.reaches_budget(progress.step)
        if at_budget:
            self.measure(model)
        elif progress.step % math.ceil(steps / ROWS) == 0:
            self.add_row()
        now = time.monotonic()
        pause = max(self.run.state_every, self.save_seconds / STATE_SHARE)
        if at_budget or distributed.broadcast_decision(now - self.saved_at >= pause, model.device):
            self.run.state.save(model, kwargs["optimizer"], progress, self.run.extra_state(model))
            self.saved_at = time.monotonic()
            self.save_seconds = self.saved_at - now
        if at_budget and progress.step < steps and self.run.ends_early(progress.rows):
            control.should_training_stop = True
            print(f"Ending early: the rest would gain at most {self.run.options.stop_gain:g} nats/token.", flush=True)
        self.step_began = time.monotonic()


def divergence_error(what: str, loss: float, step: int, run: Run) -> UserError:
    """The error of a run that cannot be continued; its state is removed, as it leads here again."""
    if distributed.rank() == 0:
        run.state.remove()
    distributed.barrier()
    return UserError(
        f"Training diverged: the {what} is {loss} at step {step} ({run.tokens(step):,} tokens), and nothing was saved; "
        f"lower learning_rate ({run.options.learning_rate:g}), or give it a longer warmup."
    )
