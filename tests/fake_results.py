"""A small results folder as the stages write it: two models, a tree of ten nodes, and a step that failed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from manifests import metrics as evaluation
from manifests import recovery, token_set
from pydantic import ConfigDict

from coppice.methods.options import MethodOptions
from coppice.study.schema import Calibration, Cost, FileText, Law, Quality, Recipe, ShippedModel, Step, Study, Tracking

FAMILIES = {"wanda": "prune", "laco": "prune", "gptq": "quantize", "full": "recover"}
OPTIONS = {
    "wanda-50": {"sparsity": 0.5, "sequential": False},
    "laco-25": {"ratio": 0.25},
    "gptq-4": {"bits": 4, "group_size": 32},
    "full-1m": {"tokens": 1_000_000, "learning_rate": 0.001, "text": "stories", "validation": "stories"},
}
DENSE = {"small": 490_000, "medium": 3_000_000}
BUDGETS = (100_000, 200_000, 400_000, 1_000_000)
PERPLEXITY = {"stories": {"text": "stories"}}
RECOVERY = recovery(
    tokens=1_000_000, tokens_requested=1_000_000, tokens_total=1_000_000, budgets=list(BUDGETS)
).model_dump()
RECIPES = (["wanda-50"], ["laco-25", "full-1m", "gptq-4"], ["broken-9"])


class AnyOptions(MethodOptions):
    """Of methods that need not exist."""

    model_config = ConfigDict(extra="allow")


def fake_study(weights: str = "none", uri: str | None = None) -> Study:
    """The study that the results belong to; its methods need not exist."""
    return Study.model_construct(
        study="demo",
        seed=0,
        models={name: ShippedModel(shipped=name) for name in DENSE},
        texts={"stories": FileText(path="stories.txt")},
        budgets=list(BUDGETS),
        steps={
            name: Step.model_construct(
                method=name.partition("-")[0], calibration=None, options=AnyOptions(**OPTIONS.get(name, {}))
            )
            for name in [*OPTIONS, "broken-9"]
        },
        calibrations={"default": Calibration(text="stories")},
        recipes=[Recipe(steps=steps) for steps in RECIPES],
        evaluations={
            "quality": Quality(kind="quality", perplexity=PERPLEXITY, tasks=["biographies"]),
            "cost": Cost(kind="cost", nodes=["small*"]),
        },
        laws={"p2": Law(law="p2")},
        tracking=Tracking(uri=uri, weights=weights),
    )


def write_results(results: Path) -> Path:
    """Writes the folder and returns it: every node of the study but `<model>/broken-9`, which left an error."""
    for model, dense in DENSE.items():
        parent_loss = 1.8 - 0.1 * math.log10(dense / 490_000)
        nodes = [
            model,
            f"{model}/wanda-50",
            f"{model}/laco-25",
            f"{model}/laco-25/full-1m",
            f"{model}/laco-25/full-1m/gptq-4",
        ]
        for index, node in enumerate(nodes):
            _node(results, node, dense)
            if node.endswith("full-1m"):
                _curve(results / "models" / node / "curve.parquet", parent_loss, 0.9 if model == "small" else 0.7)
            _quality(results / "evaluations" / node / "quality", node, math.exp(parent_loss) * (1 + 0.35 * index % 0.8))
            if model == "small":
                _cost(results / "evaluations" / node / "cost", node)
        log(
            results,
            "compress",
            f"{model}/broken-9",
            "Traceback ...\nerror: model.layers.3 has no such thing; choose another.\n",
        )
        for use in ("recovery.full-1m", "validation.full-1m", "evaluation.quality.stories"):
            tokens = token_set(fingerprint=use[0] * 64, text={"path": "stories.txt"}, role=use.partition(".")[0])
            tokens.write(results / "tokens" / model / use / "manifest.json")
    _law(results / "laws" / "p2")
    _write(results / "study.yaml", "study: demo\n")
    _write(results / "benchmarks" / "compress" / "small" / "wanda-50.jsonl", '{"s": 1.5, "max_rss": 200.0}\n')
    log(results, "compress", "small/wanda-50", "done\n")
    return results


def log(results: Path, stage: str, path: str, text: str) -> None:
    _write(results / "logs" / stage / f"{path}.log", text)


def _node(results: Path, node: str, dense: int) -> None:
    parent, _, name = node.rpartition("/")
    step = None
    if parent:
        method = name.partition("-")[0]
        step = {"name": name, "method": method, "family": FAMILIES[method], "options": OPTIONS[name]}
    total = int(dense * 0.8) if "laco" in node else dense
    bits = 5.0 if "gptq" in node else 32.0
    linears, blocks = int(total * 0.7), int(total * 0.75)
    folder = results / "models" / node
    _write(folder / "model.safetensors", f"weights of {node}")
    config = {
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": 64,
        "intermediate_size": 96 if "laco" in node else 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 2048,
    }
    _write(folder / "config.json", json.dumps(config))
    grid = {"type": "Quantized", "bits": 4, "group_size": 32, "symmetric": True}
    _write(
        folder / "compression.json",
        json.dumps({"model.layers.0.mlp.up_proj": grid} if "gptq" in node else {}),
    )
    manifest = {
        "format_version": 2,
        "node": node,
        "parent": parent or None,
        "step": step,
        "seed": 0,
        "traits": (["masked"] if "wanda" in node else []) + (["smaller"] if "laco" in node else []),
        "source": {"shipped": node.partition("/")[0], "folder_config": None},
        "requested": {"ratio": 0.25} if "laco" in node else {},
        "achieved": {"ratio": 0.2} if "laco" in node else {},
        "layers": {},
        "calibration": {"moments": "c" * 64} if step and step["family"] != "recover" else None,
        "recovery": RECOVERY if "full-1m" in node else None,
        "wall_seconds": 12.5,
        "peak_memory_bytes": 123_456_789,
        "parameters": {
            "total": total,
            "blocks": blocks,
            "decoder_linears": linears,
            "nonzero": total - (linears // 2 if "wanda" in node else 0),
        },
        "dense": {"total": dense, "blocks": int(dense * 0.75), "decoder_linears": int(dense * 0.7)},
        "dense_parameters": dense,
        "stored_bytes": int(total * bits / 8) + 2048,
        "stored_bits": {"total": int(total * bits), "decoder_linears": int(linears * bits)},
        "bits_per_weight": total * bits / dense,
        "bits_per_linear_weight": linears * bits / int(dense * 0.7),
        "rho": 1 - total / dense,
        "rho_blocks": 1 - blocks / int(dense * 0.75),
        "rho_nonzero": 0.35 if "wanda" in node else 1 - total / dense,
        "fingerprint": node.encode().hex().ljust(64, "0")[:64],
        "files": {
            "model.safetensors": {"bytes": 10, "sha256": "a" * 64},
            "config.json": {"bytes": 2, "sha256": "b" * 64},
        },
        "versions": {"python": "3.11.9", "coppice": "0.1.0", "torch": "2.13.0"},
    }
    _write(folder / "manifest.json", json.dumps(manifest))


def _curve(path: Path, dense_loss: float, scale: float) -> None:
    tokens = [0, 50_000, *BUDGETS]
    loss = [dense_loss + scale] + [dense_loss + 0.2 * scale + 0.3 * scale * (t / 1e5) ** -0.5 for t in tokens[1:]]
    columns = {
        "step": list(range(len(tokens))),
        "tokens": tokens,
        "train_loss": [None] + [value + 0.01 for value in loss[1:]],
        "validation_loss": loss,
        "lr": [1e-3] * len(tokens),
        "seconds": [float(t) / 1e4 for t in tokens],
        "budget": [t in BUDGETS for t in tokens],
        "dense_loss": [dense_loss] * len(tokens),
    }
    pq.write_table(pa.table(columns), path)


def _quality(folder: Path, node: str, perplexity: float) -> None:
    metrics: list[dict[str, Any]] = [
        {
            "metric": "perplexity_stories",
            "value": perplexity,
            "stderr": 0.05 * perplexity,
            "n": 8128,
            "unit": "perplexity",
        },
        {"metric": "biographies_acc", "value": 0.9 - perplexity / 50, "stderr": 0.02, "n": 200, "unit": "accuracy"},
    ]
    options = {"kind": "quality", "perplexity": PERPLEXITY, "tasks": ["biographies"]}
    evaluation(node=node, options=options, metrics=metrics).write(folder / "metrics.json")
    rows = [(item, choice) for item in range(3) for choice in range(2)]
    documents = list(range(10, 26))
    columns = {
        "node": [node] * 22,
        "task": ["biographies"] * 6 + ["stories"] * 16,
        "item": [str(item) for item, _ in rows] + [str(item) for item in range(16)],
        "choice": [choice for _, choice in rows] + [0] * 16,
        "log_likelihood": [-1.5 - item - choice for item, choice in rows]
        + [-tokens * math.log(perplexity) for tokens in documents],
        "length": [7] * 6 + documents,
        "correct": [item != 1 for item, _ in rows] + [None] * 16,
        "answer": [(choice == 0) == (item != 1) for item, choice in rows] + [None] * 16,
    }
    pq.write_table(pa.table(columns), folder / "items.parquet")


def _cost(folder: Path, node: str) -> None:
    metrics = [{"metric": "decode_latency", "value": 0.011, "spread": 0.001, "unit": "s/token", "simulated": False}]
    report = evaluation(node=node, evaluation="cost", kind="cost", metrics=metrics, options={"kind": "cost"})
    report.write(folder / "metrics.json")


def _law(folder: Path) -> None:
    def parameter(value: float, low: float | None, high: float | None, identified: bool = True) -> dict[str, Any]:
        stderr = None if low is None or high is None else (high - low) / 4
        ends = {"low": low, "high": high, "stderr": stderr}
        return {"value": value, **ends, "identified": identified, "spread": 0.0}

    fit: dict[str, Any] = {
        "law": "p2",
        "source": {"title": "P2 Law", "arxiv": "2411.10272", "equation": "L = L0 + rho^-gamma ..."},
        "target": "loss",
        "units": {
            "loss": {"unit": "nats per token", "scale": 1.0},
            "tokens": {"unit": "tokens", "scale": 1e6},
            "dense_parameters": {"unit": "parameters", "scale": 1e6},
        },
        "parameters": {
            "N_C": parameter(0.1, None, None, identified=False),
            "D_C": parameter(0.05, 0.04, 0.06),
            "E": parameter(0.1, 0.05, 0.2),
            "alpha": parameter(0.4, None, None, identified=False),
            "beta": parameter(0.5, 0.45, 0.55),
            "gamma": parameter(0.0, None, None, identified=False),
            "delta": parameter(0.1, 0.0, 0.2),
        },
        "metrics": {"r2": 0.991, "huber": 1e-4, "asd": 2e-6, "asd_relative": 0.05, "rmse": 0.01},
        "objective": 5e-4,
        "held_out": {
            "later_tokens": {
                "p2": {
                    "rmse": 0.012, "relative": 0.004, "low": 0.01, "high": 0.02, "naive": 0.3, "folds": [0.012],
                    "unidentified": [],
                },
                "without_delta": {
                    "rmse": 0.02, "relative": 0.008, "low": None, "high": None, "naive": 0.3, "folds": [0.02],
                    "unidentified": [],
                },
            },
            "larger_model": {"p2": {"reason": "It needs three dense sizes."}, "without_delta": {"reason": "Same."}},
        },
        "ranking": {
            "later_tokens": [
                {"form": "p2", "rmse": 0.012, "behind": 0.0, "low": 0.0, "high": 0.0, "first": 0.93},
                {"form": "without_delta", "rmse": 0.02, "behind": 0.008, "low": -0.001, "high": 0.015, "first": 0.07},
            ],
            "larger_model": [],
        },
        "profiles": {"beta": {"values": [0.4, 0.5, 0.6], "objective": [9e-4, 5e-4, 8e-4]}},
        "points": 10,
        "runs": 2,
        "recommendation": [
            {
                "model": "small", "dense_parameters": 490_000.0, "rho": 0.2, "gain": 0.01, "tokens": 1.4e6,
                "low": 9e5, "high": 2e6, "smallest_tokens": 5e4, "largest_tokens": 1e6,
                "note": "This lies beyond the largest count.",
                "sentence": "small at rho 0.20: train on 1.4M tokens [900k, 2M]; beyond, doubling them gains less.",
            }
        ],
        "notes": ["There is one pruning rate, so gamma is not identified."],
        "options": {"gain": 0.01, "residuals": "logarithmic", "huber": 0.001, "tolerance": 0.1},
        "passes": {"ok": True, "reasons": []},
        "converged": True,
        "starts_within_tolerance": 12,
    }  # fmt: skip
    _write(folder / "fit.json", json.dumps(fit))
    points = {
        "run": [],
        "model": [],
        "dense_parameters": [],
        "rho": [],
        "tokens": [],
        "loss": [],
        "dense_loss": [],
        "predicted": [],
    }
    for model, dense in DENSE.items():
        dense_loss = 1.8 - 0.1 * math.log10(dense / 490_000)
        for tokens in (50_000, *BUDGETS):
            row = (
                f"{model}/laco-25/full-1m",
                model,
                float(dense),
                0.2,
                float(tokens),
                dense_loss + 0.3,
                dense_loss,
                dense_loss + 0.31,
            )
            for column, value in zip(points.values(), row, strict=True):
                column.append(value)
    pq.write_table(pa.table(points), folder / "points.parquet")
    drawn = {name: [entry["value"]] * 8 for name, entry in fit["parameters"].items()}
    drawn |= {"D_C": [0.04, 0.06] * 4, "E": [0.08, 0.08, 0.12, 0.12] * 2, "beta": [0.45] * 4 + [0.55] * 4}
    pq.write_table(pa.table(drawn), folder / "samples.parquet")
    _write(folder / "fit.svg", '<svg xmlns="http://www.w3.org/2000/svg"/>')


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
