"""Whole records for tests that care for a few of their fields."""

from __future__ import annotations

from typing import Any

from coppice.files import FileEntry
from coppice.records.manifest import Manifest, Provenance, RecoveryRecord, StepRecord
from coppice.records.metrics import Metrics
from coppice.records.tokens import TokenSet

PARAMETERS = {"total": 1000, "blocks": 800, "decoder_linears": 700}


def provenance(**changes: Any) -> Provenance:
    """How a dense model was made, but for the changes."""
    dense: dict[str, Any] = {
        "node": "tiny",
        "parent": None,
        "step": None,
        "seed": 0,
        "traits": [],
        "source": {"path": "tiny"},
        "requested": {},
        "achieved": {},
        "layers": {},
        "calibration": None,
        "recovery": None,
        "wall_seconds": 1.5,
    }
    return Provenance(**dense | changes)


def manifest(**changes: Any) -> Manifest:
    """The manifest of a dense model, but for the changes."""
    names = Provenance.model_fields
    dense: dict[str, Any] = {
        **dict(provenance(**{name: value for name, value in changes.items() if name in names})),
        "parameters": PARAMETERS | {"nonzero": 1000},
        "dense": PARAMETERS,
        "dense_parameters": 1000,
        "stored_bytes": 4000,
        "stored_bits": {"total": 32000, "decoder_linears": 22400},
        "bits_per_weight": 32.0,
        "bits_per_linear_weight": 32.0,
        "rho": 0.0,
        "rho_blocks": 0.0,
        "rho_nonzero": 0.0,
        "fingerprint": "f" * 64,
        "files": {"model.safetensors": FileEntry(4000, "a" * 64)},
        "versions": {"coppice": "0.1.0"},
        "peak_memory_bytes": 10**8,
    }
    return Manifest(**dense | {name: value for name, value in changes.items() if name not in names})


def step(name: str, method: str, family: str, **options: Any) -> StepRecord:
    return StepRecord(name=name, method=method, family=family, options=options)


def recovery(**changes: Any) -> RecoveryRecord:
    """The record of a training run that was not interrupted, but for the changes."""
    whole: dict[str, Any] = {
        "method": "full",
        "tokens": 1000,
        "tokens_requested": 1000,
        "tokens_total": 1000,
        "budgets": [1000],
        "steps": 10,
        "stopped_early": False,
        "epochs": 1.0,
        "seconds": 2.0,
        "precision": "float32",
    }
    return RecoveryRecord(**whole | changes)


def token_set(**changes: Any) -> TokenSet:
    """The manifest of a token set, but for the changes."""
    whole: dict[str, Any] = {
        "fingerprint": "t" * 64,
        "text": {"path": "words.txt"},
        "content": "c" * 64,
        "tokenizer": "k" * 64,
        "length": 32,
        "windows": 4,
        "seed": 0,
        "role": "calibration",
        "packed": True,
        "bos": 1,
        "tokens": 128,
        "tokens_read": 130,
        "documents": 3,
    }
    return TokenSet(**whole | changes)


def metrics(**changes: Any) -> Metrics:
    """What an evaluation of no metrics wrote, but for the changes."""
    whole: dict[str, Any] = {
        "fingerprint": "e" * 64,
        "node": "tiny",
        "evaluation": "quality",
        "kind": "quality",
        "model_fingerprint": "f" * 64,
        "tokens_fingerprints": {},
        "options": {"kind": "quality"},
        "device": "cpu",
        "metrics": [],
        "versions": {},
        "wall_seconds": 1.0,
        "peak_memory_bytes": 10**8,
        "files": {},
    }
    return Metrics(**whole | changes)
