"""Results that were made of another study: something changed under the same name, and nothing made them anew.

On the machine that made them Snakemake's records notice this. They do not travel with results that lie elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from coppice import storage
from coppice.errors import UserError
from coppice.files import sha256
from coppice.models.sources import locate
from coppice.records.manifest import Manifest, RecoveryRecord
from coppice.records.renamed import METHODS, OPTIONS, rename_keys
from coppice.records.tokens import TokenSet
from coppice.study import tree
from coppice.study.schema import FileText, HubModel, Study

# Says on how many GPUs a step trained, not what it computed.
NO_MATTER = frozenset({"gpus"})


def refuse_other_node(study: Study, node: tree.Node, manifest: Manifest, path: Path, tokens: Path) -> None:
    """Raises UserError where the manifest at `path` is of another model, method, seed or option than the study's.

    So it does where a step was calibrated on other tokens than those of its calibration, or trained with other rungs of
    the ladder of budgets. Where results lie elsewhere, so it does where a file of a model that the study names by path
    has changed.

    tokens: the folder of the model's token sets; a calibration's that it does not hold tells nothing. Neither does a
    recovery of a version that recorded no budgets.
    """
    if node.step is None:
        model = study.models[node.model]
        of, was, now = f"model {node.model!r}", manifest.source.model_dump(), model.model_dump(mode="json")
        if not isinstance(model, HubModel):
            _add_files(was, now, manifest.source_files, locate(now))
    else:
        step, recorded = study.steps[node.step], manifest.step
        of, now = f"step {node.step!r}", _renamed(step.method, step.options.model_dump(mode="json"))
        was = {} if recorded is None else _renamed(recorded.method, _completed(type(step.options), recorded.options))
        if manifest.calibration:
            _add_calibration(was, now, calibration_of(study, node.step), manifest.calibration, tokens)
        if recorded is not None and recorded.family == "recover" and manifest.recovery is not None:
            _add_budgets(was, now, study.budgets, manifest.recovery)
    _refuse(f"The node {node.name!r}", of, {**was, "seed": manifest.seed}, {**now, "seed": node.seed}, path)


def _renamed(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A step's method and options under the names of this version."""
    return {"method": METHODS.get(method, method), **rename_keys(options, OPTIONS)}


def refuse_other_evaluation(study: Study, node: str, name: str, recorded: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where the node was measured by other options than those of the study's evaluation.

    recorded: the options in the metrics.json at `path`.
    """
    evaluation = study.evaluations[name]
    now = evaluation.model_dump(mode="json", exclude={"nodes", "world"})
    was = _completed(type(evaluation), {key: value for key, value in recorded.items() if key != "world"})
    # Which nodes are measured is no part of how; and what the world is follows from the study's texts.
    if "world" in recorded:
        world = tree.world(study, evaluation)
        was["world"] = recorded["world"]
        now["world"] = None if world is None else study.texts[world].model_dump(mode="json")
    _refuse(f"The evaluation {name!r} of {node!r}", f"evaluation {name!r}", was, now, path)


def refuse_other_tokens(study: Study, uses: Iterable[str], tokens: Path) -> None:
    """Raises UserError where a token set of these uses was cut from another text than the study's.

    So it does where a calibration's windows are others; those of steps and evaluations are among these ones' options.
    Where results lie elsewhere, so it does where the text's file has changed.

    tokens: the folder of a model's token sets; those that it does not hold tell nothing.
    """
    for use in uses:
        path = tokens / use / "manifest.json"
        if path.is_file():
            _refuse_other_token_set(study, use, TokenSet.read(path), path)


def _refuse_other_token_set(study: Study, use: str, manifest: TokenSet, path: Path) -> None:
    name = _text_of(study, use)
    text = study.texts[name]
    of, now = f"text {name!r}", text.model_dump(mode="json")
    was = _completed(type(text), manifest.text)
    if isinstance(text, FileText) and manifest.text_sha256 is not None:
        _add_files(was, now, {Path(text.path).name: manifest.text_sha256}, Path(text.path).parent)
    kind, _, owner = use.partition(".")
    if kind == "calibration":
        of = f"calibration {owner!r} or its {of}"
        was |= {"windows": manifest.windows, "length": manifest.length, "pack": manifest.packed}
        now |= study.calibrations[owner].model_dump(mode="json", exclude={"text"})
    _refuse(f"The token set {use!r}", of, was, now, path)


def _text_of(study: Study, use: str) -> str:
    """The name of the text that a token set is cut from."""
    kind, _, name = use.partition(".")
    if kind == "calibration":
        return study.calibrations[name].text
    if kind == "evaluation":
        evaluation, _, protocol = name.partition(".")
        return study.evaluations[evaluation].perplexity[protocol].text
    options = study.steps[name].options
    return options.text if kind == "recovery" else options.validation


def calibration_of(study: Study, step: str) -> str:
    """The calibration of a step that was calibrated: the one that it names, or the study's only one."""
    return study.steps[step].calibration or next(iter(study.calibrations))


def _add_calibration(
    was: dict[str, Any], now: dict[str, Any], name: str, recorded: Mapping[str, str], tokens: Path
) -> None:
    """Adds the first digits of the fingerprint of a calibration's tokens: as recorded, and as they are, if there.

    recorded: by the kind of statistics, or `windows`, the fingerprint of the tokens that it was gathered over.
    """
    path = tokens / f"calibration.{name}" / "manifest.json"
    if path.is_file():
        key = f"tokens of calibration {name!r}"
        was[key] = ", ".join(sorted({fingerprint[:12] for fingerprint in recorded.values()}))
        now[key] = TokenSet.read(path).fingerprint[:12]


def _add_budgets(was: dict[str, Any], now: dict[str, Any], budgets: Iterable[int], recovery: RecoveryRecord) -> None:
    """Adds the rungs of the ladder of budgets that a recovery could reach: of its own ladder, and of the study's.

    A rung above what was requested, or above where training ended early, changed nothing of the node.
    """
    if recovery.budgets is not None:
        most = min(recovery.tokens, recovery.tokens_requested)
        for rungs, ladder in ((was, recovery.budgets), (now, budgets)):
            rungs["budgets"] = sorted({budget for budget in ladder if budget <= most})


def _add_files(was: dict[str, Any], now: dict[str, Any], recorded: Mapping[str, str], folder: Path) -> None:
    """Adds the first digits of the SHA-256 of files: as recorded, and as they are, of those that are in the folder.

    Only where results lie elsewhere: otherwise the files' dates count.
    """
    here = [name for name in recorded if (folder / name).is_file()] if storage.VARIABLE in os.environ else []
    for name in here:
        status = (folder / name).stat()
        was[name], now[name] = recorded[name][:12], _digest(folder / name, status.st_size, status.st_mtime_ns)[:12]


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """The file's SHA-256, computed once for each size and date: whoever watches a study asks again and again."""
    return sha256(path)


def _completed(options: type[BaseModel], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded options, with the defaults of those that the version that recorded them did not know."""
    try:
        return options.model_validate(recorded).model_dump(mode="json")
    except ValidationError:  # of another method, or of a version that took what this one does not
        return dict(recorded)


def _refuse(what: str, of: str, was: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    changed = [key for key in now if key not in NO_MATTER and was.get(key) != now[key]]
    if changed:
        listed = ", ".join(f"{key} (was {was.get(key)}, is {now[key]})" for key in changed)
        raise UserError(
            f"{what} was made before the study's {of} changed: {listed}. Give what changed a new name, or remove "
            f"{path} from where the results are stored and run again."
        )
