"""What calibration and the solvers cost against the forward passes that calibration needs, and what dominates.

    python benchmarks/solvers_pass.py [--hidden 512] [--blocks 8] [--windows 64] [--length 128] [--threads 1]

A random Llama (25 million weights in its blocks by default) in a temporary folder; all in this process, so start-up is
no part of it. `forward`: the calibration windows through the blocks, once. The stages read and write their files as a
study does. Under each row stand the functions that take at least a twentieth of it; they contain each other.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))

SHARE = 0.05
STEPS = {"wanda": {"sparsity": 0.5}, "sparsegpt": {"sparsity": 0.5}, "gptq": {"bits": 4, "group_size": 64}}


def write_inputs(folder: Path, arguments: argparse.Namespace) -> tuple[Path, Path, int]:
    """A root's checkpoint, calibration windows, and the number of weights in the blocks' linears."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from coppice.data.windows import Windows, save_windows
    from coppice.files import sha256
    from coppice.models import modules
    from coppice.models.checkpoint import save_checkpoint
    from coppice.records.manifest import Provenance, Source
    from coppice.records.tokens import TokenSet

    tokenizer = ROOT / "resources" / "models" / "bio-small"
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=arguments.hidden,
        intermediate_size=11 * arguments.hidden // 4,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=arguments.length,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    weights = sum(leaf.weight.numel() for leaf in modules.weight_matrices(model.model.layers).values())
    root = Provenance(
        node="root",
        parent=None,
        step=None,
        seed=0,
        traits=[],
        source=Source(),
        requested={},
        achieved={},
        layers={},
        calibration=None,
        recovery=None,
        wall_seconds=0.0,
    )
    save_checkpoint(model, folder / "root", tokenizer, root, torch.bfloat16)
    shape = (arguments.windows, arguments.length)
    drawn = np.random.default_rng(0).integers(1024, size=shape, dtype=np.int32)
    tokens = TokenSet(
        fingerprint="random",
        text={"path": "random"},
        content="random",
        tokenizer=sha256(tokenizer / "tokenizer.json"),
        length=shape[1],
        windows=shape[0],
        seed=0,
        role="calibration",
        packed=True,
        bos=None,
        tokens=shape[0] * shape[1],
        tokens_read=shape[0] * shape[1],
        documents=1,
    )
    windows = Windows(drawn, np.zeros(shape, np.int32), np.zeros(1, np.int64), tokens)
    save_windows(windows, folder / "tokens")
    return folder / "root", folder / "tokens", weights


def forward(root: Path, tokens: Path) -> float:
    """Seconds of the windows through the blocks, in calibration's batches; the faster of two passes."""
    import torch

    from coppice.calibration.walk import TOKENS_IN_A_BATCH
    from coppice.data.windows import load_windows
    from coppice.models.checkpoint import load_model

    model = load_model(root)
    batches = torch.as_tensor(load_windows(tokens).tokens).long()
    batches = batches.split(max(1, TOKENS_IN_A_BATCH // batches.shape[1]))
    found = []
    with torch.no_grad():
        for _ in range(2):
            started = time.perf_counter()
            for batch in batches:
                model.model(input_ids=batch, use_cache=False)
            found.append(time.perf_counter() - started)
    return min(found)


def profiled(function: Callable[..., Any], *arguments: Any) -> tuple[float, dict[str, float]]:
    """Seconds of a call, and of each of Coppice's functions within it, those that they call included."""
    profile, started = cProfile.Profile(), time.perf_counter()
    profile.runcall(function, *arguments)
    seconds = time.perf_counter() - started
    inside = {}
    for (file, _, name), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():
        if "coppice" in file and not name.startswith("<"):
            inside[f"{Path(file).stem}.{name}"] = cumulative
    return seconds, inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 512), ("blocks", 8), ("windows", 64), ("length", 128), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    import torch

    from coppice.calibration.stage import calibrate
    from coppice.compression.stage import compress

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, tokens, weights = write_inputs(folder, arguments)
        passed = forward(root, tokens)
        print(f"{weights:,} weights, {arguments.windows * arguments.length:,} tokens, {arguments.threads} thread(s).\n")
        print("| | s | of forward | ns a weight |\n|---|---|---|---|")

        def row(what: str, seconds: float, inside: dict[str, float]) -> None:
            print(f"| {what} | {seconds:.2f} | {seconds / passed:.1f} | {1e9 * seconds / weights:.0f} |")
            for function, spent in sorted(inside.items(), key=lambda entry: -entry[1]):
                if SHARE * seconds <= spent < 0.99 * seconds:
                    print(f"| · {function} | {spent:.2f} | {spent / passed:.1f} | {1e9 * spent / weights:.0f} |")
            sys.stdout.flush()

        row("forward", passed, {})
        total = 0.0
        gathered = profiled(calibrate, root, tokens, "moments", folder / "moments", "cpu")
        total += gathered[0]
        row("calibrate moments", *gathered)
        for method, options in STEPS.items():
            step = {"name": method, "method": method, "options": options}
            made = profiled(compress, f"root/{method}", root, step, folder / method, [folder / "moments"])
            total += made[0]
            row(f"compress {method}", *made)
            shutil.rmtree(folder / method)
        row("all four", total, {})


if __name__ == "__main__":
    main()
