"""The test row of each method: options that send it every way that it can go, at the size of tiny models."""

from __future__ import annotations

from typing import Any

ROW = {"group_size": -1}

# Options of every method that does not train, one for each way through it; the first is the one that is composed with
# other methods.
ROWS: dict[str, list[dict[str, Any]]] = {
    "magnitude": [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "scope": "row", "refit": True}],
    "wanda": [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "refit": True}],
    "sparsegpt": [{"sparsity": 0.5, "block": 8}, {"pattern": "2:4"}, {"sparsity": 0.5, "bits": 4, **ROW}],
    "awp": [
        {"sparsity": 0.5, "iterations": 20},
        {"sparsity": 0.5, "iterations": 20, "step": "spectral"},
        {"bits": 4, "iterations": 3, **ROW},
        {"sparsity": 0.5, "bits": 4, "iterations": 4, **ROW},
    ],
    "net-trim": [{"epsilon": 0.3, "iterations": 20}, {"sparsity": 0.5, "iterations": 20}],
    "obert": [
        {"sparsity": 0.5, "block": 8},
        {"sparsity": 0.5, "block": 8, "unit": 4, "update": "joint", "scope": "layer"},
    ],
    "obr": [{"sparsity": 0.5}, {"sparsity": 0.5, "bits": 4, **ROW}, {"sparsity": 0.5, "bits": 4, "form": "rtn", **ROW}],
    "svd": [{"rank": 3}],
    "asvd": [
        {"keep": 0.6, "search": "strs", "grid": [0.4]},
        {"keep": 0.6},
        {"rank": 3, "statistic": "absmax", "alpha": 1},
        {"keep": 0.6, "search": "spectrum"},
    ],
    "svd-llm": [{"rank": 5}, {"rank": 3, "whitening": "cholesky"}, {"rank": 3, "update": True}],
    "fwsvd": [{"rank": 3}],
    "dobi-svd": [{"keep": 0.6, "steps": 2}, {"keep": 0.6, "remap": False, "learn": False}],
    "curing": [{"keep": 0.8}, {"rank": 3, "link": "data"}, {"rank": 3, "importance": "weight"}],
    "compactifai": [
        {"keep": 0.6},
        {"bond": 2, "sites": 3, "scaling": "absmean"},
        {"keep": 0.6, "profile": [0.1, 0.2, 0.3], "scaling": "absmean"},
    ],
    "rtn": [{"bits": 4, **ROW}, {"bits": 2, "symmetric": True, **ROW}],
    "gptq": [{"bits": 4, **ROW}, {"bits": 3, "act_order": True, "symmetric": True, "block": 4, **ROW}],
    "coordinate-descent": [{"bits": 3, **ROW}, {"bits": 3, "start": "gptq", "block": 4, **ROW}],
    "awq": [{"bits": 4, **ROW}, {"bits": 4, "duo_scaling": True, "clip": False, **ROW}],
    "flattenquant": [{"bits": 8}, {"solver": "gptq", "smoothing": 1, "fence": 0}],
    "k-bit": [{"bits": 4}, {"bits": 3, "type": "quantile"}, {"bits": 4, "type": "normal", "outliers": 0.3}],
    "learned-rounding": [{"bits": 4, "format": "float", "steps": 5}, {"bits": 3, "steps": 5, **ROW}],
    "qpruner": [
        {"bits_average": 5, **ROW},
        {"bits_average": 5, "search": "knapsack", "quantizer": "gptq", **ROW},
    ],
    "activation-quant": [{"bits": 8}],
    "eora": [{"rank": 2}],
    "shortgpt": [{"ratio": 0.5}],
    "llm-pruner": [{"ratio": 0.25}],
    "rotate": [{}],
    "kv-cache": [{"bits": 4, "group_size": 4, "window": 4}],
    "gear": [{"bits": 4, "group_size": 4, "buffer": 4, "rank": 2, "decode_rank": 1}],
}
