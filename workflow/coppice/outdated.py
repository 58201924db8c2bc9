"""Results that were made of another study: something changed under the same name, and nothing made them anew.

On the machine that made them Snakemake's records notice this. They do not travel with results that lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from coppice import tree
from coppice.errors import UserError
from coppice.study import Study

# Says on how many GPUs a step trained, not what it computed.
NO_MATTER = frozenset({"gpus"})


def refuse_other_node(study: Study, node: tree.Node, manifest: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where the manifest at `path` is of another model, method, seed or option than the study's."""
    if node.step is None:
        model = study.models[node.model]
        of, was, now = f"model {node.model!r}", manifest["source"], model.model_dump(mode="json")
    else:
        step, recorded = study.steps[node.step], manifest["step"]
        of, now = f"step {node.step!r}", {"method": step.method, **step.options.model_dump(mode="json")}
        was = {"method": recorded["method"], **_completed(type(step.options), recorded["options"])}
    _refuse(f"The node {node.name!r}", of, {**was, "seed": manifest["seed"]}, {**now, "seed": node.seed}, path)


def refuse_other_evaluation(study: Study, node: str, name: str, recorded: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where the node was measured by other options than those of the study's evaluation.

    recorded: the options in the metrics.json at `path`.
    """
    evaluation = study.evaluations[name]
    now = evaluation.model_dump(mode="json", exclude={"nodes", "world"})
    was = _completed(type(evaluation), {key: value for key, value in recorded.items() if key != "world"})
    # Which nodes are measured is no part of how; and what the world is follows from the study's texts.
    if "world" in recorded:
        was["world"] = recorded["world"]
        now["world"] = study.texts[tree.world(study, evaluation)].model_dump(mode="json")
    _refuse(f"The evaluation {name!r} of {node!r}", f"evaluation {name!r}", was, now, path)


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
