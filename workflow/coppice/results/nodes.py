"""Rows of the table of nodes, from manifests; and of curves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coppice.records.curve import read_curve
from coppice.records.layout import ResultsLayout
from coppice.records.manifest import Manifest
from coppice.records.node_name import NodeName
from coppice.results.schemas import Row
from coppice.study import changes
from coppice.study.schema import Study
from coppice.study.tree import Node, calibration_of


def checkpoint_row(study: Study, node: Node, layout: ResultsLayout, path: Path) -> Row:
    """The node's row. Raises UserError also where what it was calibrated or trained on was of another text."""
    tokens = layout.token_sets(node.model)
    row = node_row(study, node, path, tokens)
    uses = [f"calibration.{row['calibration']}"] if row["calibration"] else []
    if row["family"] == "recover":
        uses += [f"recovery.{row['step']}", f"validation.{row['step']}"]
    changes.refuse_other_tokens(study, uses, tokens)
    return row


def node_row(study: Study, node: Node, path: Path, tokens: Path) -> Row:
    """The row of a checkpoint from its manifest, without what follows from other nodes (see `add_relations`).

    tokens: the folder of the model's token sets. Raises UserError where the manifest is damaged, or is of another step,
    calibration or ladder of budgets than the study's.
    """
    manifest = Manifest.read(path)
    changes.refuse_other_node(study, node, manifest, path, tokens)
    name, step, recovery = NodeName(node.name), manifest.step, manifest.recovery
    trained = step is not None and step.family == "recover"
    return {
        "node": node.name,
        "parent": manifest.parent,
        "model": node.model,
        "recipe": name.recipe,
        "depth": name.depth,
        "step": step and step.name,
        "method": step and step.method,
        "family": step and step.family,
        "options": step and as_json(step.options),
        "traits": sorted(manifest.traits),
        "seed": manifest.seed,
        "source_kind": manifest.source.kind,
        "source": manifest.source.name,
        "source_revision": manifest.source.revision,
        "parameters": manifest.parameters.total,
        "block_parameters": manifest.parameters.blocks,
        "linear_parameters": manifest.parameters.decoder_linears,
        "nonzero_parameters": manifest.parameters.nonzero,
        "dense_parameters": manifest.dense_parameters,
        "rho": manifest.rho,
        "rho_blocks": manifest.rho_blocks,
        "rho_nonzero": manifest.rho_nonzero,
        "stored_bytes": manifest.stored_bytes,
        "stored_bits": manifest.stored_bits.total,
        "linear_bits": manifest.stored_bits.decoder_linears,
        "bits_per_weight": manifest.bits_per_weight,
        "bits_per_linear_weight": manifest.bits_per_linear_weight,
        "requested": as_json(manifest.requested),
        "achieved": as_json(manifest.achieved),
        **_calibration(study, node, manifest.calibration),
        # Nodes below one that was trained carry its record on.
        "recovery_tokens": recovery.tokens if trained and recovery else None,
        "path_recovery_tokens": recovery.tokens_total if recovery else 0,
        "wall_seconds": manifest.wall_seconds,
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "fingerprint": manifest.fingerprint,
        "versions": as_json(manifest.versions),
    }


def _calibration(study: Study, node: Node, fingerprints: Mapping[str, str] | None) -> Row:
    """Name and fingerprint of a step's calibration; all kinds of statistics share one."""
    if not fingerprints or node.step is None:
        return {"calibration": None, "calibration_fingerprint": None}
    name = calibration_of(study, node.step)
    return {"calibration": name, "calibration_fingerprint": next(iter(fingerprints.values()))}


def curve_rows(node: str, path: Path) -> list[Row]:
    """The rows of a recovery's curve.parquet: one for each loss that it holds."""
    return [
        {
            "node": node,
            "tokens": point["tokens"],
            "split": split,
            "loss": loss,
            "seconds": point["seconds"],
            "learning_rate": point["lr"],
            "dense_loss": point["dense_loss"],
            "budget": point["budget"],
        }
        for point in read_curve(path)
        for split, loss in (("train", point["train_loss"]), ("validation", point["validation_loss"]))
        if loss is not None and not math.isnan(loss)
    ]


def add_relations(checkpoints: Mapping[str, Row], curves: Iterable[Row]) -> None:
    """Adds to the rows of nodes what follows from their dense models and from their curves."""
    validation: dict[str, list[Row]] = {}
    for row in curves:
        if row["split"] == "validation":
            validation.setdefault(row["node"], []).append(row)
    for name, row in checkpoints.items():
        root = checkpoints.get(row["model"], row)
        row |= {column: root[column] for column in ("source_kind", "source", "source_revision")}
        row |= recovery_losses(validation.get(name, []))


def recovery_losses(validation: list[Row]) -> Row:
    """loss_before, loss_after, dense_loss and recovered_share, nats per token, from a run's validation rows.

    recovered_share = (loss_before - loss_after) / (loss_before - dense_loss); None where nothing had been lost, or
    where the loss before the first update is unknown.
    """
    ordered = sorted(validation, key=lambda row: row["tokens"])
    if not ordered:
        return dict.fromkeys(("loss_before", "loss_after", "dense_loss", "recovered_share"))
    first, last = ordered[0], ordered[-1]
    before, after, dense = first["loss"] if first["tokens"] == 0 else None, last["loss"], last["dense_loss"]
    lost = None if before is None or dense is None else before - dense
    share = (before - after) / lost if lost is not None and lost > 0 else None
    return {"loss_before": before, "loss_after": after, "dense_loss": dense, "recovered_share": share}


def as_json(value: Any) -> str:
    """A value as the text of a column of JSON."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
