"""`coppice recover`: makes a node by training its parent.

The held-out loss is measured before training, at each budget of the ladder, and at the end; that of the dense root on
the same windows once. An interrupted run resumes from its saved state, with the result of an undisturbed one.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.errors import UserError
from coppice.files import fingerprint, read_json_object, sha256
from coppice.methods import registry, training
from coppice.methods.options import RecoverOptions
from coppice.methods.registry import Method
from coppice.methods.step_argument import parse_step
from coppice.records.base import Json
from coppice.records.manifest import Manifest, Provenance, RecoveryRecord, StepRecord
from coppice.recovery import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from coppice.data.windows import Windows
    from coppice.recovery.journal import Run
    from coppice.recovery.state import Progress

STATE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What one recovery reads and writes.

    node: the name of the node to make. parent, dense: checkpoints. tokens, validation: windows to train on, and those
    of the held-out loss. step: name, method and options. budgets: the ladder, in tokens. state: the folder of what an
    interrupted run resumes from, saved about every `state_every` seconds. output: the folder of the checkpoint.
    """

    node: str
    parent: Path
    dense: Path
    tokens: Path
    validation: Path
    step: Mapping[str, Any]
    budgets: tuple[int, ...] = ()
    seed: int = 0
    state: Path
    state_every: float = 60.0
    output: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `coppice recover`."""
    parser.add_argument("--node", required=True, help="name of the node to make")
    parser.add_argument("--parent", type=Path, required=True, help="checkpoint to train")
    parser.add_argument("--dense", type=Path, required=True, help="checkpoint of the dense root")
    parser.add_argument("--tokens", type=Path, required=True, help="windows to train on")
    parser.add_argument("--validation", type=Path, required=True, help="windows of the held-out loss")
    parser.add_argument("--step", type=parse_step, required=True, help="the step as JSON: name, method, options")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that train together (default: 0, those of the step)")
    parser.add_argument(
        "--budgets", type=_parse_budgets, default=(), help="ladder of token budgets, separated by commas"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of windows, new weights and dropout")
    parser.add_argument(
        "--state", type=Path, required=True, help="folder of the state that an interrupted run resumes from"
    )
    parser.add_argument("--state-every", type=float, default=60.0, help="seconds between two saved states")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint to write")


def _parse_budgets(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(budget) for budget in text.split(",") if budget}))


def run(arguments: argparse.Namespace) -> None:
    """`coppice recover`, alone or as one of the processes that `distributed.launch` started."""
    if distributed.is_launched():
        distributed.join(arguments.device)
    step = arguments.step
    if arguments.gpus:
        step = {**step, "options": {**step["options"], "gpus": arguments.gpus}}
    recovery = Recovery(
        node=arguments.node,
        parent=arguments.parent,
        dense=arguments.dense,
        tokens=arguments.tokens,
        validation=arguments.validation,
        step=step,
        budgets=arguments.budgets,
        seed=arguments.seed,
        state=arguments.state,
        state_every=arguments.state_every,
        output=arguments.output,
    )
    recover(recovery, arguments.device)
    distributed.leave()


def recover(recovery: Recovery, device: str = "cpu") -> Manifest | None:
    """Trains the parent by the step's method and writes the node. Returns its manifest.

    Of several processes (see `distributed`) that train it together, the first writes; the others return None.

    Raises UserError where the method cannot work on the parent, the windows are another tokenizer's, of another length
    or not disjoint, the state is another run's, or training diverges; nothing is written then.
    """
    from coppice.compression.stage import refuse_impossible
    from coppice.data.windows import load_windows
    from coppice.models.checkpoint import load_model, read_manifest, save_checkpoint, stored_dtype
    from coppice.records.curve import write_curve

    started = time.monotonic()
    step, seed = recovery.step, recovery.seed
    parent_manifest, dense_manifest = read_manifest(recovery.parent), read_manifest(recovery.dense)
    method = registry.method(step["method"])
    options = method.validate_options(step["options"])
    assert isinstance(options, RecoverOptions)
    refuse_impossible(step["name"], method, parent_manifest.traits)
    windows, held_out = load_windows(recovery.tokens), load_windows(recovery.validation)
    _check_windows(windows, held_out, recovery.parent, options)

    import torch

    from coppice.recovery.journal import Run
    from coppice.recovery.objective import held_out_loss
    from coppice.recovery.schedule import batch_schedule
    from coppice.recovery.state import StateFile
    from coppice.recovery.trainer import device_batch_size, train

    together = distributed.world_size() > 1
    precision = _precision(options, device)
    identity = _identity(recovery, method, options, parent_manifest, dense_manifest, windows, held_out)
    requested = method.training.tokens(options, parent_manifest) if method.training.tokens else options.tokens
    schedule = batch_schedule((windows.documents >= 0).sum(axis=1), options.batch_size, requested, seed)
    planned = Run(
        method=method.training,
        options=options,
        schedule=schedule,
        budgets=recovery.budgets,
        seed=seed,
        precision=precision,
        validate=lambda model: held_out_loss(model, held_out, device_batch_size(options), precision),
        state=StateFile(recovery.state / STATE, identity),
        state_every=recovery.state_every,
    )
    planned.state.progress()  # a state of another run is refused before models are loaded
    where = f"{distributed.world_size()} processes on {torch.device(device).type}" if together else device
    print(f"{schedule.steps:,} steps of {options.batch_size} windows, in {precision} on {where}.", flush=True)

    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # Trainer trains on the current one
    loaded_on = "cpu" if together else device  # a model that is divided need not fit on a device

    def load_prepared() -> PreTrainedModel:
        model = load_model(recovery.parent, loaded_on, torch.float32)
        torch.manual_seed(seed)
        return method.training.prepare(model, options)

    def load_dense() -> PreTrainedModel:
        model = load_model(recovery.dense, loaded_on, torch.float32).requires_grad_(False)
        distributed.shard(model, device, precision)
        return model

    model = load_prepared()
    teacher = load_dense() if method.resources.teacher else None
    with tempfile.TemporaryDirectory() as folder:
        progress = train(model, windows, planned, Path(folder), teacher, device)
    if together:
        del model  # frees memory for the dense root's share
    dense_loss = planned.validate(teacher or load_dense())
    print(f"Dense model: held-out loss {dense_loss:.4f}", flush=True)
    if distributed.rank():
        return None
    if together:
        # No process has the whole model, but the state of the last step has.
        model = load_prepared()
        planned.restore(model)
    model = method.training.finish(model, options)

    with tempfile.TemporaryDirectory() as folder:
        curve = Path(folder) / "curve.parquet"
        write_curve(curve, ({**row, "dense_loss": dense_loss} for row in progress.rows))
        provenance = Provenance(
            node=recovery.node,
            parent=parent_manifest.node,
            step=StepRecord(name=step["name"], method=method.name, family=method.family, options=step["options"]),
            seed=seed,
            traits=sorted(method.traits(frozenset(parent_manifest.traits), options)),
            source=parent_manifest.source,
            requested=options.model_dump(mode="json"),
            achieved={"tokens": planned.tokens(progress.step)},
            layers={},
            calibration=None,
            recovery=recovery_record(planned, progress, method, windows, parent_manifest, requested),
            wall_seconds=time.monotonic() - started,
        )
        manifest = save_checkpoint(
            model,
            recovery.output,
            recovery.parent,
            provenance,
            stored_dtype(recovery.parent),
            parent_manifest.dense,
            extra_files={"curve.parquet": curve},
        )
    planned.state.remove()
    return manifest


def _check_windows(windows: Windows, held_out: Windows, parent: Path, options: RecoverOptions) -> None:
    """Raises UserError where windows do not fit the step and the parent, or share documents."""
    from coppice import storage
    from coppice.data.tokenizer import check_tokenizer
    from coppice.data.windows import assert_disjoint

    for use, used in (("training", windows), ("validation", held_out)):
        check_tokenizer(parent, used)
        if used.manifest.length != options.length:
            raise UserError(
                f"The {use} windows have {used.manifest.length} tokens, but the step's length is {options.length}; "
                "tokenize the text with that length."
            )
    limit = read_json_object(storage.ensure_local(parent / "config.json")).get(
        "max_position_embeddings", options.length
    )
    if options.length > limit:
        raise UserError(f"length is {options.length}, but the model of {parent} reads {limit} at most; shorten it.")
    assert_disjoint(windows, held_out)


def _precision(options: RecoverOptions, device: str) -> str:
    """That of the options; bfloat16 for `auto` on a GPU that has it."""
    import torch

    if options.precision != "auto":
        return options.precision
    return "bfloat16" if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def _identity(
    recovery: Recovery,
    method: Method,
    options: RecoverOptions,
    parent: Manifest,
    dense: Manifest,
    windows: Windows,
    held_out: Windows,
) -> Json:
    """All that the result of a run depends on, flat, so that a difference can be named.

    On how many GPUs it ran is not part of it. Its code is every file of this package, of the method and of what
    methods share with the trainer.
    """
    from coppice.laws.learning_curve.trends import pays_too_little

    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(training.__file__), *method.files]
    if options.stop_gain is not None:
        files.append(Path(inspect.getfile(pays_too_little)))
    return {
        "method": method.name,
        **{f"options.{key}": value for key, value in options.model_dump(mode="json", exclude={"gpus"}).items()},
        "seed": recovery.seed,
        "budgets": list(recovery.budgets),
        "parent": parent.fingerprint,
        "dense": dense.fingerprint,
        "tokens": windows.manifest.fingerprint,
        "validation": held_out.manifest.fingerprint,
        "code": fingerprint([sha256(file) for file in files]),
    }


def recovery_record(
    planned: Run, progress: Progress, method: Method, windows: Windows, parent: Manifest, requested: int
) -> RecoveryRecord:
    """The manifest's record of training. budgets: the whole ladder, also above where training ended."""
    tokens = planned.tokens(progress.step)
    before = parent.recovery.tokens_total if parent.recovery else 0
    return RecoveryRecord(
        method=method.name,
        tokens=tokens,
        tokens_requested=requested,
        tokens_total=before + tokens,
        budgets=list(planned.budgets),
        steps=progress.step,
        stopped_early=progress.step < planned.schedule.steps,
        epochs=planned.schedule.order[: progress.step].size / len(windows.tokens),
        seconds=progress.seconds,
        precision=planned.precision,
    )
