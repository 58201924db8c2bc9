"""What each layer method costs in time and memory, against one Cholesky factor and one product, and other libraries.

    python benchmarks/solvers.py [--sizes 512x512 1024x4096] [--methods sparsegpt gptq] [--device cpu] [--json FILE]
    make bench-solvers             # in the environment of `make crosscheck`, with the libraries

A layer is a random weight W [m, n] and the second moment H [n, n] of correlated inputs, in float32; nothing else: what
reads a whole model is left out, and printed. Every round runs all methods once, in turn, each on a moment that nothing
was computed from before. `unit`: the Cholesky factor of H in float64 and the product W H in float32, which a method
that makes up for its errors can hardly do without. Ratios are taken within a round; what is printed is the median over
rounds, seconds are those of the fastest. `library`: llm-compressor's, compressed-tensors' or bitsandbytes' function for
the same, where it can be imported.

Memory is what a run adds at its peak to what was there, in a process of its own: on the CPU resident memory (Linux
only), on CUDA what torch allocates. `loss`: tr(D H D^T) / tr(W H W^T), D = W - what stands in its place.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import platform
import statistics as statistic
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow")]

if TYPE_CHECKING:
    from torch import Tensor

PRUNED, GRID, KEPT = {"sparsity": 0.5}, {"bits": 4}, {"keep": 0.5}
# A row: its method's name, and after a comma what its options are about. A method that is registered joins by a line.
ROWS: dict[str, dict[str, Any]] = {
    "magnitude": PRUNED,
    "wanda": PRUNED,
    "sparsegpt": PRUNED,
    "sparsegpt, 2:4": {"pattern": "2:4"},
    "obr": PRUNED,
    "awp": PRUNED,
    "net-trim": PRUNED,
    "rtn": GRID,
    "gptq": GRID,
    "gptq, act-order": GRID | {"act_order": True},
    "coordinate-descent": GRID,
    "awq": GRID,
    "learned-rounding": GRID,
    "flattenquant": GRID,
    "k-bit, nf4": GRID | {"type": "normal"},
    "svd": KEPT,
    "svd-llm": KEPT,
    "asvd": KEPT,
    "dobi-svd": KEPT | {"learn": False},
    "curing": KEPT,
    "compactifai": KEPT,
    "eora": {"rank": 64},
}
# Layer methods that cannot run from a weight and a moment alone.
ELSEWHERE = {
    "fwsvd": "reads gradients of the calibration windows",
    "obert": "reads gradients of the calibration windows",
    "qpruner": "its bits are planned for a whole model",
    "activation-quant": "leaves the weights as they are",
}
UNIT = "Cholesky factor + product"
SIZES = ("512x512", "1024x4096", "2048x2048")
MEBIBYTE = 2**20
# Some methods treat linears by their place in a block.
NAME = "model.layers.0.mlp.gate_proj"


def layer(size: str, device: str) -> tuple[Tensor, Tensor]:
    """W [m, n] and H [n, n] of correlated inputs of very different power."""
    import torch

    rows, inputs = (int(part) for part in size.split("x"))
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(inputs // 2, inputs, generator=generator).to(device)
    activations *= torch.logspace(-0.5, 0.5, inputs)[torch.randperm(inputs, generator=generator)].to(device)
    moment = activations.T @ activations / len(activations)
    moment.diagonal().add_(0.1 * moment.diagonal().mean())
    return (torch.randn(rows, inputs, generator=generator) / inputs**0.5).to(device), moment


def unit(weight: Tensor, moment: Tensor) -> tuple[None, None]:
    import torch

    torch.linalg.cholesky(moment.double())
    weight @ moment
    return None, None


def ours(row: str) -> Callable[[Tensor, Tensor], Any]:
    """The method of a row, as `compress` walks over a layer with it: scales of the inputs first, where it has any.

    Returns the replacement, and the weight and the moment that it replaces.
    """
    from coppice.methods.registry import method
    from coppice.models.contracts import Linear, LinearStatistics

    found = method(row.partition(",")[0])
    options = found.validate_options(ROWS[row])

    def run(weight: Tensor, moment: Tensor) -> Any:
        power = moment.diagonal()
        mean, absmean, absmax = 0 * power, (2 / 3.14159 * power).sqrt(), 4 * power.sqrt()
        linear, seen = Linear(weight, name=NAME), LinearStatistics(moment, mean, absmean, absmax, 4096)
        if found.family == "compensate":
            linear = Linear(weight.bfloat16().to(weight.dtype), reference=weight, name=NAME)
        elif found.layer.scales is not None:
            factors = found.layer.scales([linear], seen, options)
            if factors is not None:
                linear = Linear(weight * factors, name=NAME)
                moment = moment / factors[:, None] / factors
                seen = LinearStatistics(moment, mean, absmean / factors, absmax / factors, 4096)
        return found.layer.compress(linear, seen, options), (linear.weight, moment)

    return run


def libraries() -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """The libraries' functions for rows, as far as they can be imported; a moment given to them is used up."""
    try:
        from crosscheck import libraries as theirs
    except ImportError:
        return {}
    functions = {
        "wanda": lambda weight, moment: theirs.wanda(weight, moment, 0.5),
        "sparsegpt": lambda weight, moment: theirs.sparsegpt(weight, moment, 0.5),
        "sparsegpt, 2:4": lambda weight, moment: theirs.sparsegpt(weight, moment, 0.5, (2, 4)),
        "rtn": lambda weight, moment: theirs.round_to_nearest(weight, 4, 128, False),
        "gptq": lambda weight, moment: theirs.gptq(weight, moment, 4, 128, False, False),
        "gptq, act-order": lambda weight, moment: theirs.gptq(weight, moment, 4, 128, False, True),
    }
    return {row: lambda *layer, function=function: (function(*layer), None) for row, function in functions.items()}


def runs(rows: list[str]) -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """The unit, the rows' methods and, after each, its library's function, by name."""
    theirs = libraries()
    found: dict[str, Callable[[Tensor, Tensor], Any]] = {UNIT: unit}
    for row in rows:
        found[row] = ours(row)
        if row in theirs:
            found[f"{row}, library"] = theirs[row]
    return found


def clock(run: Callable[[Tensor, Tensor], Any], weight: Tensor, moment: Tensor) -> tuple[float, Any]:
    import torch

    moment = moment.clone()
    wait = torch.cuda.synchronize if weight.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    result = run(weight, moment)
    wait()
    return time.perf_counter() - started, result


def rounds(size: str, rows: list[str], arguments: argparse.Namespace) -> tuple[list[dict[str, float]], dict, dict]:
    """For each round the seconds of every run; then losses, and sentences of what failed, by run.

    The first round prepares kernels and counts for slow runs only, which take no part in the others.
    """
    from coppice.models.replacements import Unchanged

    weight, moment = layer(size, arguments.device)
    running, losses, failures = runs(rows), {}, {}
    clock(unit, weight, moment)
    first = {}
    for name, run in running.items():
        try:
            first[name], (result, layer_seen) = clock(run, weight, moment)
            losses[name] = loss(result, *(layer_seen or (weight, moment)))
            if isinstance(result, Unchanged):
                failures[name] = result.record["unchanged"]
        except Exception as error:  # a method that fails is a row that says so
            failures[name] = f"{type(error).__name__}: {error}"
    quick = {name: running[name] for name in first if name == UNIT or first[name] <= arguments.patience}
    slow = {name: seconds for name, seconds in first.items() if name not in quick}
    found = [slow | {UNIT: first[UNIT]}] if slow else []
    for _ in range(arguments.repeats):
        found.append({name: clock(run, weight, moment)[0] for name, run in quick.items()})
    return found, losses, failures


def loss(result: Any, weight: Tensor, moment: Tensor) -> float | None:
    """None where what stands in the weight's place is no plain matrix."""
    from coppice.methods.solvers import codebook, grid
    from coppice.methods.solvers.loss import relative_error
    from coppice.models.replacements import Codebook, LowRank, Masked, Quantized

    if isinstance(result, LowRank) and not isinstance(result.first, Codebook):
        made = result.second @ result.first
    elif isinstance(result, Quantized):
        made = grid.dequantize(result)
    elif isinstance(result, Codebook):
        made = codebook.dequantize(result)
    else:
        made = result.weight if isinstance(result, Masked) else getattr(result, "weight", result)
    if getattr(made, "shape", None) != weight.shape:
        return None
    return relative_error((weight - made).double(), weight.double(), moment)


def peak(size: str, rows: list[str], name: str, device: str) -> float:
    """Bytes that a run adds at its peak, in this process."""
    import torch

    weight, moment = layer(size, device)
    run = runs(rows)[name]
    if weight.is_cuda:
        clock(unit, weight, moment)  # workspaces of libraries
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(weight, moment)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
    before = _resident("VmRSS")
    run(weight, moment)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def peaks(size: str, rows: list[str], names: list[str], arguments: argparse.Namespace) -> dict[str, float]:
    """Each run in a process of its own, forked from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "coppice.methods.registry", "crosscheck.libraries"])
    found = {}
    for name in names:
        with context.Pool(1) as pool:
            found[name] = pool.apply(peak, (size, rows, name, arguments.device))
    return found


def ratio(found: list[dict[str, float]], name: str, to: str) -> float | None:
    both = [each[name] / each[to] for each in found if name in each and to in each]
    return statistic.median(both) if both else None


def table(size: str, rows: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found, losses, failures = rounds(size, rows, arguments)
    timed = list(dict.fromkeys(name for each in found for name in each))
    measured = [name for name in timed if max(each.get(name, 0) for each in found) <= arguments.patience]
    memory = {} if arguments.no_memory else peaks(size, rows, measured, arguments)
    made = []
    for row in (UNIT, *rows):
        other = f"{row}, library"
        if row in failures:
            made.append({"size": size, "row": row, "failure": failures[row]})
            continue
        entry = {
            "size": size,
            "row": row,
            "options": ROWS.get(row),
            "seconds": [each[row] for each in found if row in each],
            "to_unit": ratio(found, row, UNIT),
            "to_library": ratio(found, row, other),
            "library_seconds": [each[other] for each in found if other in each],
            "peak_bytes": memory.get(row),
            "peak_to_unit": memory[row] / memory[UNIT] if row in memory else None,
            "peak_to_library": memory[row] / memory[other] if row in memory and other in memory else None,
            "loss": losses[row],
            "loss_to_library": losses[row] / losses[other] if losses.get(other) else None,
        }
        made.append(entry)
    return made


def show(entries: list[dict[str, Any]]) -> None:
    print(f"\n**{entries[0]['size']}**\n")
    print("| | time, s | / unit | / library | memory, MiB | / unit | / library | loss | / library |")
    print("|---|---|---|---|---|---|---|---|---|")
    for entry in entries:
        if "failure" in entry:
            print(f"| {entry['row']} | {entry['failure'][:100]} | | | | | | | |")
            continue
        mebibytes = None if entry["peak_bytes"] is None else entry["peak_bytes"] / MEBIBYTE
        cells = [
            _cell(min(entry["seconds"]), ".3f"),
            *(_cell(entry[key], ".2f") for key in ("to_unit", "to_library")),
            _cell(mebibytes, ".0f"),
            *(_cell(entry[key], ".2f") for key in ("peak_to_unit", "peak_to_library")),
            _cell(entry["loss"], ".5f"),
            _cell(entry["loss_to_library"], ".4f"),
        ]
        print(f"| {entry['row']} | {' | '.join(cells)} |")
    sys.stdout.flush()


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="MxN", help="outputs x inputs")
    parser.add_argument("--methods", nargs="+", default=list(ROWS), metavar="ROW", help="rows, or whole methods")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own number when left out")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--patience", type=float, default=20, help="seconds; a slower run is timed once")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    arguments = parser.parse_args()
    import torch

    from coppice.methods.registry import methods

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [row for row in ROWS if row in arguments.methods or row.partition(",")[0] in arguments.methods]
    layer_methods = {name for name, method in methods().items() if method.contract == "layer"}
    for name in sorted(layer_methods - {row.partition(",")[0] for row in ROWS}):
        print(f"Left out: {name} ({ELSEWHERE.get(name, 'it has no row in this script')}).")
    if not libraries():
        print("No library to compare with: run in the environment of `make crosscheck`.")
    made = []
    with torch.no_grad():
        for size in arguments.sizes:
            made.extend(table(size, rows, arguments))
            show(made[-len(rows) - 1 :])
    if arguments.json:
        where = {"device": arguments.device, "machine": platform.platform(), "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps(where | {"torch": torch.__version__, "rows": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
