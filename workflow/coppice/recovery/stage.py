"""`coppice recover`: a node made by training its parent.

Held-out loss is measured before training, at each budget of the ladder, and at the end, beside that of the dense root
on the same windows. An interrupted run goes on where its state was saved, and ends as if it had not been.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.errors import UserError
from coppice.files import fingerprint, sha256
from coppice.methods.options import RecoverOptions
from coppice.methods.registry import Method, method
from coppice.records.manifest import Manifest, Provenance, RecoveryRecord, StepRecord
from coppice.recovery import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from coppice.data.text import Windows
    from coppice.recovery.trainer import Progress, Run

STATE = "state.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `coppice recover`."""
    parser.add_argument("--node", required=True, help="name of the node to make")
    parser.add_argument("--parent", type=Path, required=True, help="checkpoint to train")
    parser.add_argument("--dense", type=Path, required=True, help="checkpoint of the dense root")
    parser.add_argument("--tokens", type=Path, required=True, help="windows to train on")
    parser.add_argument("--validation", type=Path, required=True, help="windows of the held-out loss")
    parser.add_argument("--step", type=json.loads, required=True, help="the step as JSON: name, method, options")
    parser.add_argument("--gpus", type=int, default=0, help="to train on together (default: 0, what the step says)")
    parser.add_argument("--budgets", type=_budgets, default=(), help="ladder of tokens, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the order of windows, new weights and dropout")
    parser.add_argument("--state", type=Path, required=True, help="folder for the state of an interrupted run")
    parser.add_argument("--state-every", type=float, default=60.0, help="seconds between two saved states")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint to write")


def _budgets(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(budget) for budget in text.split(",") if budget}))


def run(arguments: argparse.Namespace) -> None:
    """`coppice recover`, alone or as one of the processes that `distributed.launch` started."""
    if distributed.launched():
        distributed.join(arguments.device)
    step = arguments.step
    if arguments.gpus:
        step = {**step, "options": {**step["options"], "gpus": arguments.gpus}}
    recover(
        arguments.node,
        arguments.parent,
        arguments.dense,
        arguments.tokens,
        arguments.validation,
        step,
        arguments.budgets,
        arguments.seed,
        arguments.state,
        arguments.output,
        arguments.state_every,
        arguments.device,
    )
    distributed.leave()


def recover(
    node: str,
    parent: Path,
    dense: Path,
    tokens: Path,
    validation: Path,
    step: Mapping[str, Any],
    budgets: tuple[int, ...],
    seed: int,
    state: Path,
    output: Path,
    state_every: float = 60.0,
    device: str = "cpu",
) -> Manifest | None:
    """Trains `parent` as `step` says and writes the node. Returns its manifest.

    Of several processes (see `distributed`) that train it together, the first writes; the others return None.

    Raises UserError where the method refuses the parent, the windows are another tokenizer's, of another length or not
    disjoint, the state is another run's, or training diverges; nothing is written then.
    """
    from coppice.compression.stage import refuse_impossible
    from coppice.data.text import load_windows
    from coppice.models.checkpoint import load_model, read_manifest, save_checkpoint, stored_dtype
    from coppice.records.curve import write_curve

    started = time.monotonic()
    parent_manifest, dense_manifest = read_manifest(parent), read_manifest(dense)
    chosen = method(step["method"])
    options = chosen.validated(step["options"])
    refuse_impossible(step["name"], chosen, parent_manifest.traits)
    windows, held_out = load_windows(tokens), load_windows(validation)
    _check_windows(windows, held_out, parent, options)

    import torch

    from coppice.recovery.trainer import Run, StateFile, batch_schedule, held_out_loss, train, windows_at_once

    together = distributed.count() > 1
    precision = _precision(options, device)
    identity = _identity(chosen, options, parent_manifest, dense_manifest, windows, held_out, budgets, seed)
    requested = chosen.module.tokens(options, parent_manifest) if hasattr(chosen.module, "tokens") else options.tokens
    steps = batch_schedule((windows.documents >= 0).sum(axis=1), options.batch_size, requested, seed)
    planned = Run(
        options=options,
        course=steps,
        budgets=budgets,
        seed=seed,
        precision=precision,
        validate=lambda model: held_out_loss(model, held_out, windows_at_once(options), precision),
        state=StateFile(state / STATE, identity),
        state_every=state_every,
    )
    planned.state.progress()  # a state of another run is refused before models are loaded
    where = f"{distributed.count()} processes on {torch.device(device).type}" if together else device
    print(f"{steps.steps:,} steps of {options.batch_size} windows, in {precision} on {where}.", flush=True)

    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # Trainer trains on the current one
    loaded_on = "cpu" if together else device  # a model that is divided need not fit on a device

    def prepared() -> PreTrainedModel:
        model = load_model(parent, loaded_on, torch.float32)
        torch.manual_seed(seed)
        return chosen.module.prepare(model, options)

    def root() -> PreTrainedModel:
        model = load_model(dense, loaded_on, torch.float32).requires_grad_(False)
        distributed.shard(model, device, precision)
        return model

    model = prepared()
    teacher, loss = None, None
    if hasattr(chosen.module, "loss"):
        teacher = root()
        loss = partial(chosen.module.loss, teacher=teacher, options=options)
    with tempfile.TemporaryDirectory() as folder:
        progress = train(model, windows, planned, Path(folder), loss, device)
    if together:
        del model  # its share makes room for the dense root's
    dense_loss = planned.validate(teacher or root())
    print(f"Dense model: held-out loss {dense_loss:.4f}", flush=True)
    if distributed.rank():
        return None
    if together:
        # No process has the whole model, but the state of the last step has.
        model = prepared()
        planned.state.restore_parameters(model)
    model = chosen.module.finish(model)

    with tempfile.TemporaryDirectory() as folder:
        curve = Path(folder) / "curve.parquet"
        write_curve(curve, ({**row, "dense_loss": dense_loss} for row in progress.rows))
        provenance = Provenance(
            node=node,
            parent=parent_manifest.node,
            step=StepRecord(name=step["name"], method=chosen.name, family=chosen.family, options=step["options"]),
            seed=seed,
            traits=sorted(chosen.marks(frozenset(parent_manifest.traits), options)),
            source=parent_manifest.source,
            requested=options.model_dump(mode="json"),
            achieved={"tokens": planned.tokens(progress.step)},
            layers={},
            calibration=None,
            recovery=recovery_record(planned, progress, chosen, windows, parent_manifest, requested),
            wall_seconds=time.monotonic() - started,
        )
        manifest = save_checkpoint(
            model,
            output,
            parent,
            provenance,
            stored_dtype(parent),
            parent_manifest.dense,
            extra_files={"curve.parquet": curve},
        )
    planned.state.remove()
    return manifest


def _check_windows(windows: Windows, held_out: Windows, parent: Path, options: RecoverOptions) -> None:
    """Raises UserError where windows are not what the step and the parent need, or hold the same documents."""
    from coppice import storage
    from coppice.data.text import assert_disjoint, check_tokenizer
    from coppice.files import read_json

    for use, used in (("training", windows), ("validation", held_out)):
        check_tokenizer(parent, used)
        if used.manifest.length != options.length:
            raise UserError(
                f"The {use} windows have {used.manifest.length} tokens, but the step's length is {options.length}; "
                "tokenize the text with that length."
            )
    limit = read_json(storage.ensure_local(parent / "config.json")).get("max_position_embeddings", options.length)
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
    chosen: Method,
    options: RecoverOptions,
    parent: Manifest,
    dense: Manifest,
    windows: Windows,
    held_out: Windows,
    budgets: tuple[int, ...],
    seed: int,
) -> dict[str, Any]:
    """All that the result of a run depends on, flat, so that a difference can be named.

    On how many GPUs it ran is no part of it.
    """
    from coppice.laws import learning_curve
    from coppice.recovery import trainer

    code = {"stage": sha256(Path(__file__)), "trainer": sha256(Path(trainer.__file__)), "method": sha256(chosen.file)}
    if options.stop_gain is not None:
        code["law"] = sha256(Path(learning_curve.__file__))
    return {
        "method": chosen.name,
        **{f"options.{key}": value for key, value in options.model_dump(mode="json", exclude={"gpus"}).items()},
        "seed": seed,
        "budgets": list(budgets),
        "parent": parent.fingerprint,
        "dense": dense.fingerprint,
        "tokens": windows.manifest.fingerprint,
        "validation": held_out.manifest.fingerprint,
        "code": fingerprint(code),
    }


def recovery_record(
    planned: Run, progress: Progress, chosen: Method, windows: Windows, parent: Manifest, requested: int
) -> RecoveryRecord:
    """The manifest's record of training. budgets: the whole ladder, also what lies above where training ended."""
    tokens = planned.tokens(progress.step)
    before = parent.recovery.tokens_total if parent.recovery else 0
    return RecoveryRecord(
        method=chosen.name,
        tokens=tokens,
        tokens_requested=requested,
        tokens_total=before + tokens,
        budgets=list(planned.budgets),
        steps=progress.step,
        stopped_early=progress.step < planned.course.steps,
        epochs=planned.course.order[: progress.step].size / len(windows.tokens),
        seconds=progress.seconds,
        precision=planned.precision,
    )
