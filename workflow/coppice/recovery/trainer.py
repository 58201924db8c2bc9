"""The training loop of a recovery: transformers' Trainer, with a method's loss, optimizer and hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from coppice.data.windows import Windows
from coppice.errors import UserError
from coppice.methods.declaration import TrainingMethod
from coppice.methods.options import RecoverOptions
from coppice.methods.training import Clock, OptimizerGroup, distribute_like, trained_parameters
from coppice.models.modules import mask, weight_matrices
from coppice.recovery import distributed, objective
from coppice.recovery.journal import Journal, Run
from coppice.recovery.schedule import learning_rate
from coppice.recovery.state import Progress


def create_optimizer(model: PreTrainedModel, method: TrainingMethod, options: RecoverOptions) -> Optimizer:
    """The method's optimizer over its groups. Raises UserError where a trained parameter is in none."""
    groups = [group for group in method.parameter_groups(model, options) if group.parameters]
    grouped = {id(parameter) for group in groups for parameter in group.parameters}
    for name, parameter in trained_parameters(model).items():
        if id(parameter) not in grouped:
            raise UserError(
                f"The parameter {name} requires a gradient, but is in none of the method's parameter_groups; add it "
                "to one, or let `prepare` freeze it."
            )
    settings: list[OptimizerGroup] = [
        {
            "params": list(group.parameters),
            "lr": options.learning_rate * group.learning_rate_multiplier,
            "weight_decay": group.weight_decay,
            "maximize": group.maximize,
        }
        for group in groups
    ]
    return method.optimizer(settings, options)


class StepHooks(TrainerCallback):
    """Calls a method's `before_step` and `after_step`."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run, self.progress = run, progress

    def clock(self) -> Clock:
        run, step = self.run, self.progress.step + 1
        return Clock(step, run.schedule.steps, run.tokens(step), run.seed, run.options)

    @torch.no_grad()
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.run.method.before_step:
            self.run.method.before_step(kwargs["model"], self.clock())

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.run.method.after_step:
            self.run.method.after_step(kwargs["model"], self.clock())


class RecoveryTrainer(Trainer):
    """Trainer of a method, which reports its losses to a journal.

    masks: of trained weights of masked linears, True where a weight is kept, divided as the weights are.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the targets of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        journal: Journal,
        folder: Path,
        teacher: PreTrainedModel | None,
        masks: list[tuple[nn.Parameter, Tensor]],
    ) -> None:
        self.journal, self.teacher, self.masks = journal, teacher, masks
        run, resumed_after = journal.run, journal.progress.step
        options, steps = run.options, run.schedule.steps
        batch_size = device_batch_size(options)
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=options.batch_size // (batch_size * distributed.world_size()),
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
        optimizer = create_optimizer(model, run.method, options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(options, resumed_after + step, steps) / options.learning_rate
        )
        super().__init__(
            model=model,
            args=arguments,
            data_collator=objective.collate,
            train_dataset=objective.WindowData(windows, run.schedule.order[resumed_after:].flatten()),
            # The journal seeds a step before the hooks see it.
            callbacks=[journal, StepHooks(run, journal.progress)],
            optimizers=(optimizer, scheduler),
        )
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The summed loss of a micro-batch by the targets of the whole step."""
        tokens, labels, run = inputs["input_ids"], inputs["labels"], self.journal.run
        if run.method.loss is None:
            loss = objective.summed_loss(model, tokens, labels, run.precision)
        else:
            with objective.autocast(tokens.device, run.precision):
                loss = run.method.loss(model, tokens, labels, self.teacher, run.options)
        total, targets = distributed.sum_over_processes((loss.item(), objective.count_targets(labels)), loss.device)
        self.journal.observe(total, int(targets))
        assert num_items_in_batch is not None
        # Processes average their gradients, which are to be summed.
        return loss * distributed.world_size() / num_items_in_batch

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        """As Trainer's; pruned entries of masked weights then have no gradient."""
        loss = super().training_step(*arguments, **keywords)
        for parameter, kept in self.masks:
            assert parameter.grad is not None
            parameter.grad.mul_(kept)
        return loss


def device_batch_size(options: RecoverOptions) -> int:
    """Windows at once on each of the devices."""
    return options.micro_batch_size or options.batch_size // distributed.world_size()


def _masks(model: nn.Module) -> dict[str, Tensor]:
    """Those of masked linears whose weights train, by the linear's name.

    Methods hook the gradients of such weights, but dividing a model re-creates its parameters, without hooks.
    """
    trained = {name: linear for name, linear in weight_matrices(model).items() if linear.weight.requires_grad}
    return {name: kept for name, linear in trained.items() if (kept := mask(linear)) is not None}


def train(
    model: PreTrainedModel,
    windows: Windows,
    run: Run,
    folder: Path,
    teacher: PreTrainedModel | None = None,
    device: str = "cpu",
) -> Progress:
    """Trains the model in place, from the run's state on, and returns the whole curve.

    folder: where the Trainer may write. teacher: for the method's loss. device: of a model that several processes train
    together, which lies on the CPU; it is divided among them. Raises UserError where the state is another run's and
    where training diverges.
    """
    progress = run.state.progress()
    journal = Journal(run, progress)
    whole_masks = _masks(model) if distributed.world_size() > 1 else {}
    if progress.step:
        run.restore(model)
    distributed.shard(model, device, run.precision)
    weights = {name: model.get_parameter(f"{name}.weight") for name in whole_masks}
    masks = [(weight, distribute_like(whole_masks[name], weight)) for name, weight in weights.items()]
    if progress.step:
        print(f"Resuming after step {progress.step} ({run.tokens(progress.step):,} tokens).", flush=True)
    else:
        journal.measure(model)
    if progress.step < run.schedule.steps and not run.ends_early(progress.rows):
        use_cache = model.config.use_cache
        RecoveryTrainer(model, windows, journal, folder, teacher, masks).train()
        # Trainer switches it off for good; the model that is saved is to generate as its parent does.
        model.config.use_cache = use_cache
    return progress
