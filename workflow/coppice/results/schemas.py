"""The schemas of the tables: each column with its type, unit and meaning. A column that is a field of a record has them
from there."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from coppice.records.arrow import column_field, field
from coppice.records.base import Column
from coppice.records.curve import CurvePoint
from coppice.records.failure import Failure
from coppice.records.manifest import (
    Manifest,
    Parameters,
    Provenance,
    RecoveryRecord,
    Source,
    StepRecord,
    StoredBits,
)
from coppice.records.metrics import Item, Metric, Metrics

Row = dict[str, Any]

_text, _integer, _number, _flag = pa.string(), pa.int64(), pa.float64(), pa.bool_()


def _table(description: str, key: str, *columns: pa.Field) -> pa.Schema:
    """A schema; `key` names the columns that rows are sorted by."""
    return pa.schema(columns, metadata={"description": description, "key": key})


def _column(name: str, kind: pa.DataType, unit: str, text: str) -> pa.Field:
    return column_field(name, kind, Column(text, unit))


def _fields(record: type, *names: str) -> list[pa.Field]:
    return [field(record, name) for name in names]


_EVALUATION = field(Metrics, "evaluation")

SCHEMAS = {
    "nodes": _table(
        "One row per checkpoint.",
        "node",
        *_fields(Provenance, "node", "parent"),
        _column("model", _text, "", "Dense model at the root of its path."),
        _column("recipe", _text, "", "Steps from the dense model to here, joined by `/`; empty for a dense model."),
        _column("depth", pa.int32(), "steps", "Number of steps from the dense model."),
        field(StepRecord, "name", "step"),
        *_fields(StepRecord, "method", "family", "options"),
        *_fields(Provenance, "traits", "seed"),
        _column("source_kind", _text, "", "Where the dense model came from: shipped, path or hub."),
        _column("source", _text, "", "Its name, folder or hub repository."),
        field(Source, "revision", "source_revision"),
        field(Parameters, "total", "parameters"),
        field(Parameters, "blocks", "block_parameters"),
        field(Parameters, "decoder_linears", "linear_parameters"),
        field(Parameters, "nonzero", "nonzero_parameters"),
        *_fields(Manifest, "dense_parameters", "rho", "rho_blocks", "rho_nonzero", "stored_bytes"),
        field(StoredBits, "total", "stored_bits"),
        field(StoredBits, "decoder_linears", "linear_bits"),
        *_fields(Manifest, "bits_per_weight", "bits_per_linear_weight", "requested", "achieved"),
        _column("calibration", _text, "", "Name of the calibration that the step read; null where it read none."),
        _column("calibration_fingerprint", _text, "", "Fingerprint of the calibration's tokens."),
        _column("recovery_tokens", _integer, "tokens", "Tokens that this step trained on; null if it did not train."),
        field(RecoveryRecord, "tokens_total", "path_recovery_tokens"),
        _column("loss_before", _number, "nats/token", "Recovery steps: validation loss before the first update."),
        _column("loss_after", _number, "nats/token", "Recovery steps: validation loss of the final weights."),
        field(CurvePoint, "dense_loss"),
        _column(
            "recovered_share",
            _number,
            "ratio",
            "(loss_before - loss_after) / (loss_before - dense_loss): 1 is all of the loss that compression cost. Null "
            "for steps that do not train and where nothing was lost.",
        ),
        *_fields(Manifest, "wall_seconds", "peak_memory_bytes", "fingerprint", "versions"),
    ),
    "metrics": _table(
        "One row per quality measured of a node.",
        "node evaluation metric",
        field(Metrics, "node"),
        _EVALUATION,
        *_fields(Metric, "metric", "value", "stderr", "low", "high", "n", "unit"),
        _column("details", _text, "JSON", "What else the evaluation recorded: protocol, task, shots, text."),
    ),
    "items": _table(
        "One row per answer choice of a benchmark item, or per document of a perplexity: nodes are compared in pairs.",
        "node evaluation task item choice",
        field(Item, "node"),
        _EVALUATION,
        *_fields(Item, "task", "item", "choice", "log_likelihood", "length", "correct", "answer"),
    ),
    "curves": _table(
        "One row per loss along a recovery run.",
        "node tokens split",
        _column("node", _text, "", "The node that the run computed."),
        field(CurvePoint, "tokens"),
        _column("split", _text, "", "Text of the loss: train (mean since the row before) or validation (held out)."),
        _column("loss", _number, "nats/token", "Cross-entropy."),
        field(CurvePoint, "seconds"),
        field(CurvePoint, "lr", "learning_rate"),
        *_fields(CurvePoint, "dense_loss", "budget"),
    ),
    "costs": _table(
        "One row per cost of a node: what its files weigh, what running it takes, and what a device's bandwidth and "
        "peak allow at best (the roofline, a lower bound of times).",
        "node evaluation device metric",
        field(Metrics, "node"),
        _column("evaluation", _text, "", "Name of the evaluation; null for costs of the checkpoint's files."),
        _column(
            "device",
            _text,
            "",
            "Device that the node ran on, or `<device> (roofline)` for a lower bound; null for what depends on none.",
        ),
        _column("metric", _text, "", "What was measured."),
        _column("value", _number, "see unit", "The measurement."),
        _column("spread", _number, "see unit", "Spread over repeats; null where nothing was repeated."),
        _column("unit", _text, "", "Unit of value and spread."),
        _column("simulated", _flag, "", "Whether the number is of a device or format that did not run here."),
        _column(
            "details", _text, "JSON", "Sequences and tokens of the measurement, and the source of a device's figures."
        ),
    ),
    "comparisons": _table(
        "One row per pair of nodes and measure: over the items that both were measured on, in pairs. A pair that was "
        "measured on different items has no row.",
        "evaluation task measure node relation",
        _column("node", _text, "", "The node compared."),
        _column("other", _text, "", "The node that it is compared with."),
        _column(
            "relation",
            _text,
            "",
            "What the other node is: `dense` (its dense model), `parent`, or `next` (of the nodes of the same dense "
            "model the next better one on this measure).",
        ),
        _EVALUATION,
        field(Item, "task"),
        _column(
            "measure",
            _text,
            "",
            "`accuracy` of a task, `log_probability` of its right choices (mean), or `loss` of a protocol.",
        ),
        _column("difference", _number, "see unit", "The node's measure less the other's."),
        _column(
            "stderr", _number, "see unit", "Its standard error: standard deviation over paired resamples of the items."
        ),
        _column("low", _number, "see unit", "Lower end of its 95% interval: percentile of those resamples."),
        _column("high", _number, "see unit", "Upper end of that interval."),
        _column(
            "n", _integer, "items", "Items shared: questions, documents, or windows of a text that is one document."
        ),
        _column(
            "p_value",
            _number,
            "probability",
            "Of no difference, two-sided: by those resamples or, where none crosses zero, by the normal tail.",
        ),
        _column("p_adjusted", _number, "probability", "The same, by Holm's method for all pairs in the family."),
        _column("family", _integer, "pairs", "Different pairs compared on this evaluation, task and measure."),
        _column(
            "mcnemar_p",
            _number,
            "probability",
            "McNemar's exact p value of the flips, not adjusted; null for others.",
        ),
        _column("right_to_wrong", _integer, "items", "Items that the other node answers rightly and this one wrongly."),
        _column("wrong_to_right", _integer, "items", "Items that this node answers rightly and the other one wrongly."),
        _column("flip_rate", _number, "ratio", "Part of the items that are one of the two."),
        _column(
            "distinguishable",
            _flag,
            "",
            "Whether the two are significantly different: p_adjusted < 0.05 and, where both were made with several "
            "seeds, the difference is more than 2 sqrt(variance over seeds of the one + of the other).",
        ),
        _column("unit", _text, "", "Unit of difference, stderr, low and high."),
    ),
    "signals": _table(
        "One row per metric of two or more nodes that differ in the seed of their recovery only, and one per recovery: "
        "its monotonicity.",
        "group evaluation metric",
        _column("group", _text, "", "Path of the nodes without their seeds."),
        _column("evaluation", _text, "", "Name of the evaluation in the study; null for metrics of recovery curves."),
        _column(
            "metric",
            _text,
            "",
            "Metric of the evaluation; or of the curves `validation_loss` (at the end), "
            "`validation_loss_seed_deviation` (standard deviation over seeds, averaged over the curve) or "
            "`validation_loss_monotonicity` (Kendall's tau of the negative loss with the tokens; 1: it only falls).",
        ),
        _column("mean", _number, "see unit", "Mean over seeds."),
        _column("std", _number, "see unit", "Standard deviation over seeds; null for a single seed."),
        _column("low", _number, "see unit", "Lower end of the 95% interval of std, for normal draws (chi-square)."),
        _column("high", _number, "see unit", "Upper end of that interval."),
        _column("seeds", _integer, "seeds", "Number of seeds."),
        _column("snr", _number, "ratio", "Signal-to-noise ratio: mean / std; null where the seeds do not differ."),
        _column("item_stderr", _number, "see unit", "Mean of the nodes' own standard errors, over items."),
        _column("unit", _text, "", "Unit of mean, std, low, high and item_stderr."),
    ),
    "failures": _table(
        "One row per output of the study that is missing because its job failed, or that is damaged.",
        "stage log",
        *_fields(Failure, "node", "stage", "error", "log"),
    ),
}
