"""Trains a small Llama from scratch on the built-in world of biographies (`coppice.data.biographies`).

This script trained the shipped models. The corpus is a stream: each time a person comes up, the biography is
rendered again, after "Physics of Language Models: Part 3.3" (Allen-Zhu and Li, arXiv 2404.05405): AdamW and packed
windows. The learning rate warms up, stays, and falls linearly to zero at the end ("MiniCPM", Hu et al., arXiv
2404.06395), so that it does not depend on the length of the training until the fall begins: a training that was
stopped before that may resume with more or fewer tokens than it was started with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from coppice.data import biographies
from coppice.data.biographies import World
from coppice.errors import UserError
from coppice.files import atomic_directory, atomic_write
from pretraining_metrics import (
    accuracy,
    batch_items,
    log_likelihood,
    measure,
    next_token_loss,
    windows,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SEGMENT = 100  # steps between two saved states; each segment reads a stream of its own, so resuming skips nothing
WARMUP = 100  # steps
FALL = 0.3  # share of the steps
WEIGHT_DECAY = 0.02
CLIP = 1.0


@dataclass(frozen=True)
class Architecture:
    """The shape of a Llama with tied embeddings: widths in units, `key_value_heads` the number of KV groups."""

    hidden: int = 96
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 2
    head_dim: int = 16
    intermediate: int = 256

    def build(self, tokenizer: PreTrainedTokenizerFast, window: int) -> LlamaForCausalLM:
        """A float32 model with random weights that reads windows of `window` tokens."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate,
            max_position_embeddings=window,
            tie_word_embeddings=True,
            initializer_range=0.5 * self.hidden**-0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: `tokens` in all, `batch` windows of `window` tokens a step."""

    tokens: int = 20_000_000
    learning_rate: float = 3e-3
    batch: int = 8
    window: int = 128
    seed: int = 0

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch * self.window))

    @property
    def fall(self) -> int:
        """The step at which the learning rate begins to fall."""
        return math.floor((1 - FALL) * self.steps)

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        return self.learning_rate * min(1, (step + 1) / WARMUP, (self.steps - step) / (self.steps - self.fall))


def batches(
    world: World, tokenizer: PreTrainedTokenizerFast, schedule: Schedule, segment: int
) -> Iterator[torch.Tensor]:
    """The batches [batch, window] of token ids of one segment of the training."""
    import torch

    texts = biographies.stream(world, "train", f"{schedule.seed}/{segment}")
    for rows in batch_items(windows(texts, tokenizer, schedule.window), schedule.batch):
        yield torch.tensor(rows)


class Progress(TypedDict):
    """How far a training has come. seconds: of training. documents: read. curve: a point for each segment."""

    step: int
    seconds: float
    documents: int
    curve: list[dict[str, float]]


def resume(
    state: Path, plan: Mapping[str, Mapping[str, Any]], model: LlamaForCausalLM, optimizer: torch.optim.Optimizer
) -> Progress:
    """Loads a killed training's `state` into `model` and `optimizer` and returns its progress.

    Raises UserError, naming what differs, where the state is of another plan. Another number of tokens is the same
    plan as long as, by both, the learning rate had not begun to fall.
    """
    import torch
    from safetensors import safe_open

    with safe_open(state, framework="pt") as file:
        saved = {key: json.loads(text) for key, text in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    different = [
        flag(group, field)
        for group, options in plan.items()
        for field, value in options.items()
        if saved["plan"][group].get(field) != value
    ]
    fall = min(Schedule(**given["schedule"]).fall for given in (saved["plan"], plan))
    if different and (different != ["--tokens"] or saved["progress"]["step"] > fall):
        raise UserError(
            f"The training state {state} is of a training with another {' and '.join(different)}; pass the options of "
            "that training, or remove the file to start over."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, place, key = name.split(".")
            moments.setdefault(int(place), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return saved["progress"]


def save_state(
    state: Path,
    plan: Mapping[str, Mapping[str, Any]],
    progress: Progress,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes what `resume` needs: parameters and moments as tensors, plan and progress as JSON metadata."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for place, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{place}.{key}": tensor for key, tensor in moments.items()}
    with atomic_write(state) as temporary:
        save_file(tensors, temporary, metadata={"plan": json.dumps(plan), "progress": json.dumps(progress)})


def pretrain(
    world: World, architecture: Architecture, schedule: Schedule, output: Path, state: Path, threads: int = 1
) -> Mapping[str, Any]:
    """Trains a model and writes it, its tokenizer and `training.json` (the returned record) to the folder `output`.

    Weights are stored in bfloat16, and all that is measured is measured with the stored weights. An exposure is a
    biography begun in some window, for each person. The file `state` lets a killed training go on where its last
    segment ended; it is removed at the end.
    """
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(schedule.seed)
    tokenizer = biographies.tokenizer(world)
    model = architecture.build(tokenizer, schedule.window)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    plan = {"world": asdict(world), "architecture": asdict(architecture), "schedule": asdict(schedule)}
    progress: Progress = {"step": 0, "seconds": 0.0, "documents": 0, "curve": []}
    if state.exists():
        progress = resume(state, plan, model, optimizer)
    while progress["step"] < schedule.steps:
        train_segment(model, optimizer, tokenizer, world, schedule, progress)
        save_state(state, plan, progress, model, optimizer)
    model.bfloat16()
    with atomic_directory(output, last="training.json") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # Read again, as the conversion to bfloat16 took the rotary frequencies with it, which are not stored.
        stored = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        record = {
            "command": command(plan, output),
            **plan,
            "tokens": progress["step"] * schedule.batch * schedule.window,
            "exposures": progress["documents"] / world.people,
            "train_loss": progress["curve"][-1]["loss"],
            **measure(stored, tokenizer, world, schedule.window),
            "seconds": progress["seconds"],
            "threads": threads,
            "versions": versions(),
            "curve": progress["curve"],
        }
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    state.unlink(missing_ok=True)
    return record


def train_segment(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    schedule: Schedule,
    progress: Progress,
) -> None:
    """Trains to the end of the next segment, in place, and adds a point to the curve of `progress`."""
    import torch

    model.train()
    began = time.monotonic()
    segment = progress["step"] // SEGMENT
    steps = range(progress["step"], min(schedule.steps, (segment + 1) * SEGMENT))
    losses = []
    for step, tokens in zip(steps, batches(world, tokenizer, schedule, segment), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = next_token_loss(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress["documents"] += int((tokens == tokenizer.bos_token_id).sum())
    model.eval()
    progress["step"] = steps.stop
    progress["seconds"] += time.monotonic() - began
    score = log_likelihood(model, tokenizer)
    point = {
        "tokens": steps.stop * schedule.batch * schedule.window,
        "exposures": round(progress["documents"] / world.people, 1),
        "loss": sum(losses) / len(losses),
        "accuracy": accuracy(score, biographies.questions(world, min(200, world.people), seed=1)),
        "seconds": round(progress["seconds"], 1),
    }
    progress["curve"].append(point)
    print(
        f"{point['tokens']:>11,} of {schedule.tokens:,} tokens, {point['exposures']:.0f} exposures: "
        f"loss {point['loss']:.4f}, accuracy {point['accuracy']:.3f}, {point['seconds']:.0f} s",
        flush=True,
    )


def versions() -> dict[str, str]:
    """The versions of what the result depends on."""
    import tokenizers
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


GROUPS = (("world", World), ("architecture", Architecture), ("schedule", Schedule))


def flag(group: str, field: str) -> str:
    """The option of a field: those of the world begin with --world-."""
    return "--" + (f"world-{field}" if group == "world" else field).replace("_", "-")


def command(plan: Mapping[str, Mapping[str, Any]], output: Path) -> str:
    """The command that makes the model again: every option that is not the default."""
    parts = ["python", "resources/pretraining.py"]
    for group, kind in GROUPS:
        for field in dataclasses.fields(kind):
            if plan[group][field.name] != field.default:
                parts += [flag(group, field.name), str(plan[group][field.name])]
    return shlex.join([*parts, "--output", str(output)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    for group, kind in GROUPS:
        options = parser.add_argument_group(group)
        for field in dataclasses.fields(kind):
            options.add_argument(
                flag(group, field.name),
                type=type(field.default),
                default=field.default,
                help=f"default {field.default}",
            )
    parser.add_argument("--output", type=Path, required=True, help="the folder of the model")
    parser.add_argument(
        "--state", type=Path, help="where a killed training resumes from; by default next to the output"
    )
    parser.add_argument("--threads", type=int, default=1, help="default 1")


def field_values(arguments: argparse.Namespace, group: str, kind: type) -> Mapping[str, Any]:
    """The values of a group's options by the fields of its type."""
    values = vars(arguments)
    return {
        field.name: values[flag(group, field.name).removeprefix("--").replace("-", "_")]
        for field in dataclasses.fields(kind)
    }


def run(arguments: argparse.Namespace) -> None:
    """Trains the model and prints what it knows."""
    output = arguments.output
    record = pretrain(
        World(**field_values(arguments, "world", World)),
        Architecture(**field_values(arguments, "architecture", Architecture)),
        Schedule(**field_values(arguments, "schedule", Schedule)),
        output=output,
        state=arguments.state or output.with_name(f".{output.name}.state"),
        threads=arguments.threads,
    )
    knowledge = record["knowledge"]
    print(
        f"{record['parameters']:,} parameters, held-out loss {record['held_out_loss']:.4f}, accuracy "
        f"{record['question_accuracy']:.3f}, {knowledge['bits_per_person']:.2f} of "
        f"{knowledge['bits_per_person_max']:.2f} bits a person, {knowledge['bits_per_parameter']:.3f} bits a parameter"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small dense model on the built-in biographies.")
    add_arguments(parser)
    run(parser.parse_args())
