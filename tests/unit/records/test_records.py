"""Every record: what is written is read back, and what is damaged or newer is refused with a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_results import write_results
from manifests import manifest, metrics, recovery, step, token_set
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.records.arrow import read_parquet
from coppice.records.base import Record
from coppice.records.compression import read_compression
from coppice.records.curve import CurvePoint, read_curve, write_curve
from coppice.records.fit import FitRecord
from coppice.records.manifest import Manifest
from coppice.records.metrics import Metric, Metrics
from coppice.records.statistics import Statistics

STATISTICS = Statistics(
    kind="moments",
    model_fingerprint="m" * 64,
    tokens_fingerprint="t" * 64,
    fingerprint="s" * 64,
    tokens=100,
    blocks=1,
    aliases={"0": {"self_attn.q_proj": "self_attn.q_proj", "self_attn.k_proj": "self_attn.q_proj"}},
    files={"block-000.safetensors": "b" * 64},
    versions={"coppice": "0.1.0"},
    wall_seconds=2.0,
)
TRAINED = manifest(
    node="tiny/cut/full@1",
    parent="tiny/cut",
    step=step("full", "full", "recover", tokens=1000, text="words"),
    seed=1,
    traits=["masked"],
    layers={"model.layers.0.mlp.up_proj": {"sparsity": 0.5, "pattern": None}},
    recovery=recovery(),
)
MEASURED = metrics(metrics=[Metric(metric="loss_own", value=2, stderr=None, unit="nats/token", n=5, task="own")])
RECORDS: list[Record] = [manifest(), TRAINED, MEASURED, token_set(), STATISTICS]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_what_is_written_is_read_back(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.write(path)
    assert type(record).read(path) == record
    assert next(iter(json.loads(path.read_text()))) == "format_version"


def test_a_fit_is_written_as_the_law_reported_it(tmp_path: Path) -> None:
    path = write_results(tmp_path / "demo") / "laws/p2/fit.json"
    before = json.loads(path.read_text())
    fit = FitRecord.read(path)
    fit.write(path)
    assert json.loads(path.read_text()) == before
    assert fit.target_and_unit == ("loss", "nats per token")
    assert fit.own_errors["larger_model"].sentence("loss", "nats") == "It needs three dense sizes."


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"source": {"title": "P2"}}, "lacks 'source.equation'"),
        ({"units": {}}, "lacks 'units.loss'"),
        ({"law": "chinchilla"}, r"lacks 'held_out\.\w+\.chinchilla'"),
        ({"options": {}}, "lacks 'options.huber'"),
        ({"profiles": {"zeta": {}}}, "lacks 'parameters.zeta', of which it has a profile"),
    ],
)
def test_a_fit_whose_parts_do_not_fit_each_other_is_refused(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write_results(tmp_path / "demo") / "laws/p2/fit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"fit\.json {problem}; it is damaged"):
        FitRecord.read(path)


@pytest.mark.parametrize("content", ["[]", '{"a": 3}', '{"a": {}}', '{"a": {"type": 3}}'])
def test_a_damaged_compression_json_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "compression.json").write_text(content)
    with pytest.raises(UserError, match=r"compression\.json(: the entry 'a' has no type;| is not a JSON object;)"):
        read_compression(tmp_path)


@pytest.mark.parametrize("version", [True, 0, -1, "2"])
def test_a_format_that_is_not_a_number_from_1_on_is_refused(version: Any, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest().to_json() | {"format_version": version}))
    with pytest.raises(UserError, match="which is not a number from 1 on"):
        Manifest.read(path)


def test_further_keys_of_a_metric_are_its_details(tmp_path: Path) -> None:
    row = {"metric": "loss_own", "value": 2, "unit": "nats/token", "task": "own", "note": None}
    metrics(metrics=[Metric.model_validate(row)]).write(tmp_path / "metrics.json")
    [written] = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert written == row
    [entry] = Metrics.read(tmp_path / "metrics.json").metrics
    assert entry.details == {"task": "own"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"parameters": None}, "has a wrong value of 'parameters'"),
        ({"parameters": {"total": 1, "blocks": 1, "decoder_linears": 1}}, "lacks 'parameters.nonzero'"),
        ({"step": {"name": "cut"}}, "lacks 'step.method'"),
        ({"rho": "much"}, "has a wrong value of 'rho' (input should be a valid number"),
        ({"files": {"model.safetensors": {"bytes": 3}}}, "lacks 'files.model.safetensors.sha256'"),
        ({"format_version": "two"}, "has format_version 'two', which is not a number"),
    ],
)
def test_a_damaged_manifest_is_named_with_what_is_wrong(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest().to_json() | change))
    with pytest.raises(UserError) as caught:
        Manifest.read(path)
    assert str(caught.value).startswith(f"{path} {problem}")
    assert str(caught.value).endswith("; it is damaged or was edited by hand: remove it and run again.")


@pytest.mark.parametrize("record", [*RECORDS[1:], None], ids=lambda record: type(record).__name__)
def test_every_record_is_refused_without_any_of_its_required_keys(record: Record | None, tmp_path: Path) -> None:
    if record is None:
        record = FitRecord.read(write_results(tmp_path / "demo") / "laws/p2/fit.json")
    path, whole = tmp_path / "record.json", record.to_json()
    for name, field in type(record).model_fields.items():
        if field.is_required():
            path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
            with pytest.raises(UserError, match=re.escape(f"{path} lacks '{name}'; it is damaged")):
                type(record).read(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("[]", "is not a JSON object; it is damaged"), ('{"node": ', "is not valid JSON"), (None, "does not exist")],
)
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"metrics.json {sentence}"):
        Metrics.read(path)


def test_a_newer_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest().to_json() | {"format_version": 3}))
    with pytest.raises(UserError) as caught:
        Manifest.read(path)
    assert str(caught.value) == (
        f"{path} has format 3, this version of Coppice reads up to 2; use a newer Coppice or recompute it."
    )


def test_a_field_cannot_be_written_twice() -> None:
    """Peak memory was set by recovery once, and then overwritten by whoever saved the checkpoint."""
    whole = dict(manifest())
    with pytest.raises(TypeError, match="multiple values for keyword argument 'peak_memory_bytes'"):
        Manifest(**whole, peak_memory_bytes=1)
    with pytest.raises(ValidationError, match="frozen"):
        manifest().peak_memory_bytes = 1


# Literal, as version 0.1 wrote it.
VERSION_1 = {
    "format_version": 1,
    "node": "tiny/round/full",
    "parent": "tiny/round",
    "step": {
        "name": "round",
        "method": "round-inputs",
        "family": "quantize",
        "options": {"bits": 8, "propagate": True, "linears": ["q_proj"]},
    },
    "seed": 0,
    "marks": ["quantized-inputs", "masked"],
    "source": {"shipped": "bio-tiny", "folder_config": None},
    "asked": {"bits": 8, "propagate": True, "linears": ["q_proj"]},
    "achieved": {},
    "layers": {},
    "calibration": None,
    "recovery": {
        "method": "full",
        "tokens": 1024,
        "tokens_asked": 1000,
        "tokens_total": 1024,
        "steps": 16,
        "epochs": 0.5,
        "seconds": 3.0,
        "precision": "float32",
    },
    "wall_seconds": 4.0,
    "parameters": {"total": 1000, "blocks": 800, "decoder_linears": 700, "nonzero": 650},
    "dense": {"total": 1000, "blocks": 800, "decoder_linears": 700},
    "dense_parameters": 1000,
    "stored_bytes": 4100,
    "stored_bits": {"total": 32000, "decoder_linears": 22400},
    "bits_per_weight": 32.0,
    "bits_per_linear_weight": 32.0,
    "rho": 0.0,
    "rho_blocks": 0.0,
    "rho_nonzero": 0.35,
    "fingerprint": "f",
    "files": {"model.safetensors": {"bytes": 4100, "sha256": "a"}},
    "versions": {"coppice": "0.1.0"},
}


def test_a_manifest_of_format_1_is_upgraded_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(VERSION_1))
    old = Manifest.read(path)
    assert old.traits == ["quantized-activations", "masked"]
    assert old.step is not None and old.recovery is not None
    options = {"bits": 8, "sequential": True, "target_modules": ["q_proj"]}
    assert (old.step.method, old.step.options, old.requested) == ("activation-quant", options, options)
    assert (old.recovery.tokens_requested, old.recovery.budgets, old.recovery.stopped_early) == (1000, None, False)
    assert old.peak_memory_bytes is None
    assert (old.source.kind, old.source.name) == ("shipped", "bio-tiny")
    old.write(path)
    written = json.loads(path.read_text())
    assert written["format_version"] == 2
    assert not {"marks", "asked"} & written.keys() and "tokens_asked" not in written["recovery"]
    assert Manifest.read(path) == old


def test_a_damaged_manifest_of_format_1_is_refused_and_not_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(VERSION_1 | {"marks": 3, "step": {"method": ["a"]}}))
    with pytest.raises(UserError, match=r"lacks 'step.name'; it is damaged"):
        Manifest.read(path)


def point(tokens: int, train: float | None, validation: float | None) -> CurvePoint:
    return {
        "step": tokens // 10,
        "tokens": tokens,
        "train_loss": train,
        "validation_loss": validation,
        "lr": 1e-3,
        "seconds": 0.5,
        "budget": False,
        "dense_loss": 1.5,
    }


def test_a_curve_is_read_back_and_refused_when_it_lacks_a_column(tmp_path: Path) -> None:
    path, points = tmp_path / "curve.parquet", [point(0, None, 3.0), point(10, 2.5, None)]
    write_curve(path, points)
    assert read_curve(path) == points
    write_curve(path, [])
    assert read_curve(path) == []
    assert str(read_parquet(path, ["train_loss"]).schema.field("train_loss").type) == "double"
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(path).drop_columns("lr"), path)
    with pytest.raises(UserError, match=r"curve\.parquet has no column 'lr'; remove it and run again"):
        read_curve(path)
