"""Outdated results: something of the study changed under the same name, and nothing recomputed them.

On the machine that computed them Snakemake's records notice this. These do not travel with results that lie elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, JsonValue, ValidationError

from coppice import storage
from coppice.errors import UserError
from coppice.files import sha256
from coppice.methods.options import MethodOptions
from coppice.methods.registry import current_name, current_options
from coppice.models.sources import locate
from coppice.records.base import Json
from coppice.records.manifest import Manifest, RecoveryRecord, StepRecord
from coppice.records.tokens import TokenSet
from coppice.study import tree
from coppice.study.schema import FileText, HubModel, Study
from coppice.study.schema.evaluations import protocols
from coppice.study.tree import calibration_of

# Options that do not change what a step computes: on how many GPUs it trains.
WITHOUT_EFFECT = frozenset({"gpus"})


def refuse_other_node(study: Study, node: tree.Node, manifest: Manifest, path: Path, tokens: Path) -> None:
    """Raises UserError where the manifest at `path` is of another model, method, seed or option than the study's.

    It also raises where a step was calibrated on other tokens than those of its calibration, or trained with other
    rungs of the ladder of budgets. Where results lie elsewhere, it raises for a changed file of a model that the study
    names by path, too.

    tokens: the folder of the model's token sets. A calibration without a token set is not compared, nor are
    the budgets of a recovery of a version that did not record them.
    """
    if node.step is None:
        model = study.models[node.model]
        of, was, now = f"model {node.model!r}", manifest.source.model_dump(), model.model_dump(mode="json")
        if not isinstance(model, HubModel):
            _add_files(was, now, manifest.source_files, locate(now))
    else:
        step, recorded = study.steps[node.step], manifest.step
        of, now = f"step {node.step!r}", {"method": step.method, **step.options.model_dump(mode="json")}
        was = _recorded_step(recorded, type(step.options)) if recorded else {}
        if manifest.calibration:
            _add_calibration(was, now, calibration_of(study, node.step), manifest.calibration, tokens)
        if recorded and recorded.family == "recover" and manifest.recovery:
            _add_budgets(was, now, study.budgets, manifest.recovery)
    _refuse(f"The node {node.name!r}", of, {**was, "seed": manifest.seed}, {**now, "seed": node.seed}, path)


def _recorded_step(recorded: StepRecord, options: type[MethodOptions]) -> Json:
    """The method and the options of a recorded step, under the names of this version."""
    return {
        "method": current_name(recorded.method),
        **_add_defaults(options, current_options(recorded.options, options)),
    }


def refuse_other_evaluation(study: Study, node: str, name: str, recorded: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where the node was measured by other options than those of the study's evaluation.

    recorded: the options in the metrics.json at `path`.
    """
    evaluation = study.evaluations[name]
    now = evaluation.model_dump(mode="json", exclude={"nodes", "world"})
    was = _add_defaults(type(evaluation), {key: value for key, value in recorded.items() if key != "world"})
    # Which nodes are measured does not change how; and what the world is follows from the study's texts.
    if "world" in recorded:
        world = tree.world(study, evaluation)
        was["world"] = recorded["world"]
        now["world"] = study.texts[world].model_dump(mode="json") if world else None
    _refuse(f"The evaluation {name!r} of {node!r}", f"evaluation {name!r}", was, now, path)


def refuse_other_tokens(study: Study, uses: Iterable[str], tokens: Path) -> None:
    """Raises UserError where a token set of these uses was cut from another text than the study's.

    It also raises where a calibration has other windows (those of steps and evaluations are among their options) and,
    where results lie elsewhere, where the text's file has changed.

    tokens: the folder of a model's token sets; those that do not exist are not compared.
    """
    for use in uses:
        path = tokens / use / "manifest.json"
        if path.is_file():
            _refuse_other_token_set(study, use, TokenSet.read(path), path)


def _refuse_other_token_set(study: Study, use: str, manifest: TokenSet, path: Path) -> None:
    name = _text_name(study, use)
    text = study.texts[name]
    of, now = f"text {name!r}", text.model_dump(mode="json")
    was = _add_defaults(type(text), manifest.text)
    if isinstance(text, FileText) and manifest.text_sha256 is not None:
        _add_files(was, now, {Path(text.path).name: manifest.text_sha256}, Path(text.path).parent)
    kind, _, owner = use.partition(".")
    if kind == "calibration":
        of = f"calibration {owner!r} or its {of}"
        was |= {"windows": manifest.windows, "length": manifest.length, "pack": manifest.packed}
        now |= study.calibrations[owner].model_dump(mode="json", exclude={"text"})
    _refuse(f"The token set {use!r}", of, was, now, path)


def _text_name(study: Study, use: str) -> str:
    """The name of the text that a token set is cut from."""
    kind, _, name = use.partition(".")
    if kind == "calibration":
        return study.calibrations[name].text
    if kind == "evaluation":
        evaluation, _, protocol = name.partition(".")
        return protocols(study.evaluations[evaluation])[protocol].text
    options = tree.training_options(study, name)  # only training steps have token sets of their own
    return options.text if kind == "recovery" else options.validation


def _add_calibration(was: Json, now: Json, name: str, recorded: Mapping[str, str], tokens: Path) -> None:
    """Adds the first digits of the fingerprint of a calibration's tokens: as recorded, and as they are, if there.

    recorded: by the kind of statistics, or `windows`, the fingerprint of the tokens that it was gathered over.
    """
    path = tokens / f"calibration.{name}" / "manifest.json"
    if path.is_file():
        key = f"tokens of calibration {name!r}"
        was[key] = ", ".join(sorted({fingerprint[:12] for fingerprint in recorded.values()}))
        now[key] = TokenSet.read(path).fingerprint[:12]


def _add_budgets(was: Json, now: Json, budgets: Iterable[int], recovery: RecoveryRecord) -> None:
    """Adds the rungs of the ladder of budgets that a recovery could reach: of its own ladder, and of the study's.

    A rung above the requested tokens, or above where training ended early, did not change the node.
    """
    if recovery.budgets is not None:
        most = min(recovery.tokens, recovery.tokens_requested)
        for rungs, ladder in ((was, recovery.budgets), (now, budgets)):
            rungs["budgets"] = list[JsonValue](sorted({budget for budget in ladder if budget <= most}))


def _add_files(was: Json, now: Json, recorded: Mapping[str, str], folder: Path) -> None:
    """Adds the first digits of the SHA-256 of files: as recorded, and as they are, of those that are in the folder.

    Only where results lie elsewhere: otherwise the files' dates count.
    """
    present = [name for name in recorded if (folder / name).is_file()] if storage.VARIABLE in os.environ else []
    for name in present:
        status = (folder / name).stat()
        was[name], now[name] = recorded[name][:12], _digest(folder / name, status.st_size, status.st_mtime_ns)[:12]


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """The file's SHA-256, computed once for each size and date: a tracker compares the same files every few seconds."""
    return sha256(path)


def _add_defaults(options: type[BaseModel], recorded: Mapping[str, Any]) -> Json:
    """Recorded options, with the defaults of those that the recording version did not have."""
    try:
        return options.model_validate(recorded).model_dump(mode="json")
    except ValidationError:  # of another method, or of a version that accepted what this one does not
        return dict(recorded)


def _refuse(what: str, of: str, was: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    changed = [key for key in now if key not in WITHOUT_EFFECT and was.get(key) != now[key]]
    if changed:
        differences = ", ".join(f"{key} (was {was.get(key)}, is {now[key]})" for key in changed)
        raise UserError(
            f"{what} was made before the study's {of} changed: {differences}. Give what changed a new name, or remove "
            f"{path} from where the results are stored and run again."
        )
