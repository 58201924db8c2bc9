"""A small study for tests, and the folder that it stands in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def small_study() -> dict[str, Any]:
    """A study with every family of methods, as a YAML reader gives it."""
    texts = {"text": "biographies", "validation": "biographies", "length": 32}
    return {
        "study": "small",
        "models": {"tiny": {"path": "tiny"}},
        "texts": {"biographies": {"builtin": "biographies", "people": 50}},
        "budgets": [1_000, 10_000],
        "calibrations": {"default": {"text": "biographies", "windows": 4, "length": 32}},
        "steps": {
            "shortgpt-1": {"method": "shortgpt", "blocks": 1},
            "wanda-50": {"method": "wanda", "sparsity": 0.5},
            "rtn-4": {"method": "rtn", "bits": 4, "group_size": 32},
            "gptq-4": {"method": "gptq", "bits": 4, "group_size": 32, "sequential": True},
            "eora-2": {"method": "eora", "rank": 2},
            "full-5k": {"method": "full", **texts, "tokens": 5_000},
            "lora-5k": {"method": "lora", **texts, "tokens": 5_000},
        },
        "recipes": [
            ["wanda-50", "full-5k"],
            ["wanda-50", "rtn-4", "eora-2"],
            {"product": [["shortgpt-1"], ["full-5k", None], ["gptq-4"]], "seeds": [0, 1]},
        ],
        "evaluations": {
            "quality": {
                "kind": "quality",
                "perplexity": {"own": {"text": "biographies", "length": 32, "windows": 4}},
                "knowledge": True,
            },
            "cost": {"kind": "cost", "nodes": ["*/rtn-4", "tiny"]},
        },
        "laws": {"p2": {"law": "p2"}},
    }


def tiny_folder(directory: Path, model_type: str = "llama") -> Path:
    """A folder `tiny` that looks like a model to whoever reads its config alone."""
    folder = directory / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder
